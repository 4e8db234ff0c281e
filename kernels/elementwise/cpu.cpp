// Element-wise attention on CPUs: one walk over the tokens, W channels at a time, all sums of a block in registers.
//
// Sums run in fp32 over blocks of BLOCK tokens, from zero; what entered the block is added where it is read, and blocks add
// up in fp64. A block of W channels stays in the first-level cache, so backward walks it twice, first to the right for
// what its tokens have seen (y, den, dq), then to the left for who has seen them (dk, dv), at the cost of one reading from
// memory. README.md has the formulas; the guards are those of reference.py.
//
// Compiled for one order: -DORDER=6.
#include "native.h"

namespace {

constexpr int BLOCK = 64;
constexpr float Q_LIMIT = 1000.0f, DEN_FLOOR = 1e-30f, GRAD_LIMIT = 1e25f;
// Below these magnitudes no gradient of a sum comes near GRAD_LIMIT: 2^8/8! 16^8 1e8 1e8 < 1e25.
constexpr float TAME_Q = 16.0f, TAME = 1e8f;

// A tensor [B, L, D] whose channels lie side by side; D is a multiple of W.
template <class X>
struct Tokens {
  X* data;
  int64_t row, token;  // strides
  X* at(int64_t b, int64_t i, int64_t c) const { return data + b * row + i * token + c; }
  // A stripe of channels jumps from row to row, which no processor foresees: asks for the same place of another block.
  void expect(int64_t b, int64_t i, int64_t c) const {
    if (data) __builtin_prefetch(at(b, i, c), !std::is_const_v<X>);
  }
};

// A pair of sums for every power: (S, Z), or their gradients (R, U).
template <int T>
struct Sums {
  vec a[T + 1], b[T + 1];

  // Every index is known when this is compiled, so that sums can stay in registers.
  Sums() { clear(); }
  void clear() {
#pragma GCC unroll 16
    for (int i = 0; i <= T; ++i) a[i] = vec{}, b[i] = vec{};
  }
  // From and to fp64 [2, T+1, n].
  void read(const double* p, int64_t n) {
#pragma GCC unroll 16
    for (int i = 0; i <= T; ++i) a[i] = narrow(p + i * n), b[i] = narrow(p + (T + 1 + i) * n);
  }
  void add_to(double* p, int64_t n) const {
#pragma GCC unroll 16
    for (int i = 0; i <= T; ++i) add_wide(p + i * n, a[i]), add_wide(p + (T + 1 + i) * n, b[i]);
  }
};

constexpr float ratio(int n) { return 2.0f / float(n); }  // c_n / c_(n-1)

// Adds what a token gives: k^n w (v, 1).
template <int T>
inline void give(Sums<T>& sums, vec k, vec v, vec w) {
#pragma GCC unroll 16
  for (int n = 0; n <= T; ++n) {
    sums.b[n] += w;
    sums.a[n] += w * v;
    w *= k;
  }
}

// Adds what a token gives backward: c_n q^n a (1, -y).
template <int T, bool tame>
inline void ask(Sums<T>& sums, vec q, vec a, vec y) {
  vec power = splat(1.0f);
#pragma GCC unroll 16
  for (int n = 0; n <= T; ++n) {
    vec r = power * a;
    if (!tame) r = clamp(r, GRAD_LIMIT);
    vec u = -r * y;
    if (!tame) u = clamp(u, GRAD_LIMIT);
    sums.a[n] += r;
    sums.b[n] += u;
    power *= q * ratio(n + 1);
  }
}

struct Seen {
  vec num, den, top, bottom;  // sum c_n q^n (S, Z), and, for the derivative, sum c_(n-1) q^(n-1) (S, Z)
};

// What a token reads of the sums inside its block and of those before it, by Horner's rule.
template <int T, bool derivative>
inline void look(Seen& seen, const Sums<T>& inside, const Sums<T>& before, vec q) {
  vec num = inside.a[T] + before.a[T], den = inside.b[T] + before.b[T], top = num, bottom = den;
#pragma GCC unroll 16
  for (int n = T; n > 0; --n) {
    vec s = inside.a[n - 1] + before.a[n - 1], z = inside.b[n - 1] + before.b[n - 1], step = q * ratio(n);
    if (derivative && n > 1) {
      vec lower = q * ratio(n - 1);
      top = top * lower + s, bottom = bottom * lower + z;
    }
    num = num * step + s, den = den * step + z;
  }
  seen.num = num, seen.den = den;
  if (derivative) seen.top = top, seen.bottom = bottom;
}

inline vec quotient(const Seen& seen) { return seen.num / vmax(seen.den, splat(DEN_FLOOR)); }

struct Gradients {
  vec k, v;
};

template <int T>
inline Gradients answer(const Sums<T>& inside, const Sums<T>& before, vec k, vec v, vec w) {
  vec r = inside.a[0] + before.a[0], u = inside.b[0] + before.b[0];
  vec rising_r = r * w, rising_u = u * w, falling_r{}, falling_u{};
#pragma GCC unroll 16
  for (int n = 1; n <= T; ++n) {
    r = inside.a[n] + before.a[n], u = inside.b[n] + before.b[n];
    vec slope = w * float(n);
    falling_r += slope * r;
    falling_u += slope * u;
    w *= k;
    rising_r += w * r;
    rising_u += w * u;
  }
  vec twice = k * -2.0f;
  return {(falling_r + twice * rising_r) * v + (falling_u + twice * rising_u), rising_r};
}

// A token's upstream gradient: a = g / den, y where the denominator has a gradient, and dq.
struct Upstream {
  vec a, y, dq;
};
inline Upstream upstream(const Seen& seen, vec raw_q, vec g) {
  vec den = vmax(seen.den, splat(DEN_FLOOR));
  Upstream up;
  up.a = g / den;
  up.y = seen.den < DEN_FLOOR ? splat(0.0f) : clamp(seen.num / den, largest<float>());
  up.dq = clamp(up.a * 2.0f * (seen.top - up.y * seen.bottom), GRAD_LIMIT);
  up.dq = vabs(raw_q) > Q_LIMIT ? splat(0.0f) : up.dq;
  return up;
}

inline bool any(ivec mask) {
  int32_t all = 0;
  for (int w = 0; w < W; ++w) all |= mask[w];
  return all != 0;
}

template <class X>
struct Call {
  int64_t B, L, D;
  Tokens<const X> q, k, v, g;
  Tokens<X> y, dq, dk, dv;
  const uint8_t* begins;  // [B, L], whether a document begins at a token (not at the piece's first), or null
  const float* past;      // [B, 2, T+1, D], or [2, B, 2, T+1, D] where tokens see both sides
  const float* future;    // likewise, or null for zeros
  float* end;             // what leaves, of the shape of past, or null
  float* states;          // [B, N, 2, T+1, D], what enters each block; written forward, read backward, or null

  bool begin(int64_t b, int64_t i) const { return begins && begins[b * L + i]; }
};

// fp64 sums [2, T+1, n] of a task's n channels.
struct Wide {
  int64_t n, orders;
  std::vector<double> sums;
  Wide(const Task& task, int orders) : n(task.last - task.first), orders(orders), sums(2 * orders * n) {}
  double* at(int64_t c) { return sums.data() + c; }
  void clear() { std::fill(sums.begin(), sums.end(), 0.0); }
  // From and to [2, T+1, D] at a task's first channel.
  void add(const float* p, int64_t D) {
    if (p)
      for (int64_t i = 0; i < 2 * orders; ++i)
        for (int64_t c = 0; c < n; ++c) sums[i * n + c] += p[i * D + c];
  }
  void write(float* p, int64_t D) const {
    if (p)
      for (int64_t i = 0; i < 2 * orders; ++i)
        for (int64_t c = 0; c < n; ++c) p[i * D + c] = float(sums[i * n + c]);
  }
};

template <int T>
void load_state(Sums<T>& sums, const float* p, int64_t D) {
#pragma GCC unroll 16
  for (int i = 0; i <= T; ++i) sums.a[i] = load(p + i * D), sums.b[i] = load(p + (T + 1 + i) * D);
}
template <int T>
void store_state(const Sums<T>& sums, float* p, int64_t D) {
#pragma GCC unroll 16
  for (int i = 0; i <= T; ++i) store(p + i * D, sums.a[i]), store(p + (T + 1 + i) * D, sums.b[i]);
}

inline const float* offset(const float* p, int64_t n) { return p ? p + n : nullptr; }
inline float* offset(float* p, int64_t n) { return p ? p + n : nullptr; }

// The weights exp(-k^2) of a block. What a token needs alone is done in loops of its own, here and below: their turns do
// not wait for each other as the sums do.
template <class X>
inline void weigh(const Tokens<const X>& k, int64_t b, int64_t c, int64_t first, int64_t last, int64_t ahead, vec* weights) {
  for (int64_t i = first; i < last; ++i) {
    k.expect(b, i + ahead, c);
    vec x = load(k.at(b, i, c));
    weights[i - first] = vexp(-x * x);
  }
}

// Causal, forward: y (unless null), the states that enter the blocks, and what leaves.
template <int T, class X>
void forward(const Call<X>& x, const Task& task) {
  const int64_t b = task.row, D = x.D, size = 2 * (T + 1) * D, blocks = (x.L + BLOCK - 1) / BLOCK;
  vec weights[BLOCK];
  Seen seen[BLOCK];
  Wide wide(task, T + 1);
  wide.add(offset(x.past, b * size + task.first), D);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * BLOCK, last = std::min(x.L, first + BLOCK);
    for (int64_t c = task.first; c < task.last; c += W) {
      double* total = wide.at(c - task.first);
      Sums<T> before, inside;
      before.read(total, wide.n);
      if (x.states) store_state(before, x.states + (b * blocks + block) * size + c, D);
      weigh(x.k, b, c, first, last, BLOCK, weights);
      for (int64_t i = first; i < last; ++i) {
        if (x.begin(b, i)) {
          before.clear(), inside.clear();
          for (int n = 0; n < 2 * (T + 1); ++n) std::fill_n(total + n * wide.n, W, 0.0);
        }
        x.v.expect(b, i + BLOCK, c);
        give(inside, load(x.k.at(b, i, c)), load(x.v.at(b, i, c)), weights[i - first]);
        if (x.y.data) {
          x.q.expect(b, i + BLOCK, c);
          look<T, false>(seen[i - first], inside, before, clamp(load(x.q.at(b, i, c)), Q_LIMIT));
        }
      }
      inside.add_to(total, wide.n);
      for (int64_t i = first; x.y.data && i < last; ++i) {
        x.y.expect(b, i + BLOCK, c);
        store_finite(x.y.at(b, i, c), quotient(seen[i - first]));
      }
    }
  }
  wide.write(offset(x.end, b * size + task.first), D);
}

// The walk to the left of a block of W channels: gradients of k and v, and of what enters from the right.
template <int T, class X, bool tame>
void leftward(const Call<X>& x, int64_t b, int64_t c, int64_t first, int64_t last, const Upstream* up,
              const vec* weights, double* total, int64_t n) {
  Sums<T> before, inside;
  before.read(total, n);
  for (int64_t i = last - 1; i >= first; --i) {
    if (i + 1 < x.L && x.begin(b, i + 1)) {
      before.clear(), inside.clear();
      for (int m = 0; m < 2 * (T + 1); ++m) std::fill_n(total + m * n, W, 0.0);
    }
    const Upstream& here = up[i - first];
    ask<T, tame>(inside, clamp(load(x.q.at(b, i, c)), Q_LIMIT), here.a, here.y);
    if (x.dk.data) {
      vec k = load(x.k.at(b, i, c)), v = load(x.v.at(b, i, c));
      Gradients grads = answer(inside, before, k, v, weights[i - first]);
      store_finite(x.dk.at(b, i, c), grads.k);
      store_finite(x.dv.at(b, i, c), grads.v);
    }
  }
  inside.add_to(total, n);
}

// Causal, backward: gradients of q, k, v (unless null) and of what entered.
template <int T, class X>
void backward(const Call<X>& x, const Task& task) {
  const int64_t b = task.row, D = x.D, size = 2 * (T + 1) * D, blocks = (x.L + BLOCK - 1) / BLOCK;
  Wide wide(task, T + 1);
  wide.add(offset(x.future, b * size + task.first), D);
  for (int64_t block = blocks - 1; block >= 0; --block) {
    const int64_t first = block * BLOCK, last = std::min(x.L, first + BLOCK);
    for (int64_t c = task.first; c < task.last; c += W) {
      Upstream up[BLOCK];
      vec weights[BLOCK];
      Seen seen[BLOCK];
      ivec wild{};
      Sums<T> before, inside;
      load_state(before, x.states + (b * blocks + block) * size + c, D);
      weigh(x.k, b, c, first, last, -BLOCK, weights);
      for (int64_t i = first; i < last; ++i) {
        for (const auto& t : {x.q, x.v}) t.expect(b, i - BLOCK, c);
        if (x.begin(b, i)) before.clear(), inside.clear();
        give(inside, load(x.k.at(b, i, c)), load(x.v.at(b, i, c)), weights[i - first]);
        look<T, true>(seen[i - first], inside, before, clamp(load(x.q.at(b, i, c)), Q_LIMIT));
      }
      for (int64_t i = first; i < last; ++i) {
        x.g.expect(b, i - BLOCK, c);
        for (const auto& t : {x.dq, x.dk, x.dv}) t.expect(b, i - BLOCK, c);
        vec raw = load(x.q.at(b, i, c));
        Upstream here = upstream(seen[i - first], raw, load(x.g.at(b, i, c)));
        if (x.dq.data) store_finite(x.dq.at(b, i, c), here.dq);
        wild |= (vabs(here.a) > TAME) | (vabs(here.y) > TAME) | (vabs(raw) > TAME_Q);
        up[i - first] = here;
      }
      auto walk = any(wild) ? leftward<T, X, false> : leftward<T, X, true>;
      walk(x, b, c, first, last, up, weights, wide.at(c - task.first), wide.n);
    }
  }
  wide.write(offset(x.end, b * size + task.first), D);
}

// Both sides visible: a document's sums first, then each of its tokens. In `forward` terms the piece's first document also
// sees what came from the left, its last one what came from the right; gradients cross the same edges.
template <int T, class X>
void whole_documents(const Call<X>& x, const Task& task, bool gradients) {
  const int64_t b = task.row, D = x.D, size = 2 * (T + 1) * D, other = x.B * size, here = b * size + task.first;
  Wide sums(task, T + 1), grads(task, T + 1);
  auto for_blocks = [&](int64_t start, int64_t stop, auto body) {
    for (int64_t first = start; first < stop; first += BLOCK)
      for (int64_t c = task.first; c < task.last; c += W)
        body(first, std::min(stop, first + BLOCK), c);
  };
  for (int64_t start = 0, stop; start < x.L; start = stop) {
    for (stop = start + 1; stop < x.L && !x.begin(b, stop); ++stop) {}
    const bool is_first = start == 0, is_last = stop == x.L;
    sums.clear();
    if (is_first) sums.add(offset(x.past, here), D);
    if (is_last) sums.add(offset(x.past, other + here), D);
    for_blocks(start, stop, [&](int64_t first, int64_t last, int64_t c) {
      Sums<T> inside;
      for (int64_t i = first; i < last; ++i) {
        vec k = load(x.k.at(b, i, c)), v = load(x.v.at(b, i, c));
        give(inside, k, v, vexp(-k * k));
      }
      inside.add_to(sums.at(c - task.first), sums.n);
    });
    if (!gradients) {
      // States leave to the right from the last document, to the left from the first.
      if (is_last) sums.write(offset(x.end, here), D);
      if (is_first) sums.write(offset(x.end, other + here), D);
      if (!x.y.data) continue;
      for_blocks(start, stop, [&](int64_t first, int64_t last, int64_t c) {
        Sums<T> all, none;
        all.read(sums.at(c - task.first), sums.n);
        for (int64_t i = first; i < last; ++i) {
          Seen seen;
          look<T, false>(seen, all, none, clamp(load(x.q.at(b, i, c)), Q_LIMIT));
          store_finite(x.y.at(b, i, c), quotient(seen));
        }
      });
      continue;
    }
    grads.clear();
    if (is_last) grads.add(offset(x.future, here), D);
    if (is_first) grads.add(offset(x.future, other + here), D);
    for_blocks(start, stop, [&](int64_t first, int64_t last, int64_t c) {
      Sums<T> all, none, inside;
      all.read(sums.at(c - task.first), sums.n);
      for (int64_t i = first; i < last; ++i) {
        vec raw = load(x.q.at(b, i, c)), q = clamp(raw, Q_LIMIT);
        Seen seen;
        look<T, true>(seen, all, none, q);
        Upstream up = upstream(seen, raw, load(x.g.at(b, i, c)));
        if (x.dq.data) store_finite(x.dq.at(b, i, c), up.dq);
        ask<T, false>(inside, q, up.a, up.y);
      }
      inside.add_to(grads.at(c - task.first), grads.n);
    });
    // What entered from the left reached the first document, from the right the last.
    if (is_first) grads.write(offset(x.end, here), D);
    if (is_last) grads.write(offset(x.end, other + here), D);
    if (!x.dk.data) continue;
    for_blocks(start, stop, [&](int64_t first, int64_t last, int64_t c) {
      Sums<T> all, none;
      all.read(grads.at(c - task.first), grads.n);
      for (int64_t i = first; i < last; ++i) {
        vec k = load(x.k.at(b, i, c)), v = load(x.v.at(b, i, c));
        Gradients to = answer(all, none, k, v, vexp(-k * k));
        store_finite(x.dk.at(b, i, c), to.k);
        store_finite(x.dv.at(b, i, c), to.v);
      }
    });
  }
}

template <int T, class X>
void run(const Call<X>& x, bool causal, bool gradients) {
  const std::vector<Task> all = tasks(x.B, x.D);
#pragma omp parallel for schedule(static)
  for (size_t t = 0; t < all.size(); ++t) {
    if (!causal)
      whole_documents<T>(x, all[t], gradients);
    else if (gradients)
      backward<T>(x, all[t]);
    else
      forward<T>(x, all[t]);
  }
}

template <class X>
void run(const int64_t* shape, const void* const* data, const int64_t* strides, bool causal, bool gradients) {
  auto input = [&](int n) { return Tokens<const X>{(const X*)data[n], strides[2 * n], strides[2 * n + 1]}; };
  auto output = [&](int n) { return Tokens<X>{(X*)data[n], strides[2 * n], strides[2 * n + 1]}; };
  Call<X> x{shape[0], shape[1], shape[2], input(0), input(1), input(2), input(3), output(4), output(5), output(6), output(7),
            (const uint8_t*)data[8], (const float*)data[9], (const float*)data[10], (float*)data[11], (float*)data[12]};
  run<ORDER>(x, causal, gradients);
}

}  // namespace

// shape: B, L, D. data: q k v g y dq dk dv begins past future end states, null where not wanted; strides: of the first
// eight, over rows and over tokens, in elements.
extern "C" void elementwise(int is_bf16, int causal, int gradients, const int64_t* shape, const void* const* data,
                            const int64_t* strides) {
  if (is_bf16)
    run<bf16>(shape, data, strides, causal, gradients);
  else
    run<float>(shape, data, strides, causal, gradients);
}
