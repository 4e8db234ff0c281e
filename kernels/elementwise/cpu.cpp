// Element-wise attention on CPUs: one pass over the tokens, W channels at a time, all sums of a chunk in registers.
//
// Sums run in fp32 over chunks of CHUNK tokens, from zero; the state before the chunk is added where it is series, and sums
// over chunks are fp64. A chunk of W channels, a stripe, stays in the first-level cache, so backward goes over it twice, from
// left to right for y, den and dq, then from right to left for dk and dv, and memory is read once. README.md has the
// formulas; the guards are those of reference.py.
//
// Compiled for one order: -DORDER=6.
#include "native.h"

namespace {

constexpr int CHUNK = 64;
constexpr int64_t PANEL = 512;  // channels of a chunk that are copied at a time: they stay in the second-level cache
constexpr float Q_LIMIT = 1000.0f, DEN_FLOOR = 1e-30f, GRAD_LIMIT = 1e25f;
// Below these magnitudes no gradient of a sum comes near GRAD_LIMIT: 2^8/8! 16^8 1e8 1e8 < 1e25.
constexpr float TAME_Q = 16.0f, TAME = 1e8f;

// A tensor [B, L, D] with contiguous channels; D is a multiple of W.
template <class X>
struct Tokens {
  X* data;
  int64_t row, token;  // strides
  X* at(int64_t b, int64_t i, int64_t c) const { return data + b * row + i * token + c; }
};

// A pair of sums for every power: (S, Z), or their gradients (R, U).
template <int T>
struct Sums {
  vec a[T + 1], b[T + 1];

  // Loops are unrolled, so that every index is a constant and sums stay in registers.
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

// Adds the terms of a token: k^n w (v, 1).
template <int T>
inline void add_key(Sums<T>& sums, vec k, vec v, vec w) {
#pragma GCC unroll 16
  for (int n = 0; n <= T; ++n) {
    sums.b[n] += w;
    sums.a[n] += w * v;
    w *= k;
  }
}

// Adds the terms of a token backward: c_n q^n a (1, -y).
template <int T, bool tame>
inline void add_query(Sums<T>& sums, vec q, vec a, vec y) {
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

struct Series {
  vec num, den, top, bottom;  // sum c_n q^n (S, Z), and, for the derivative, sum c_(n-1) q^(n-1) (S, Z)
};

// The numerator and denominator of a token, from the sums within its chunk and the state before it, by Horner's rule.
template <int T, bool derivative>
inline void evaluate(Series& series, const Sums<T>& inside, const Sums<T>& before, vec q) {
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
  series.num = num, series.den = den;
  if (derivative) series.top = top, series.bottom = bottom;
}

// NaN for infinities, which a clamp, an exponential or a quotient would turn into finite numbers.
inline vec exposed(vec x) { return x + x * 0.0f; }
template <class X>
inline vec exposed(const X* p) {
  return exposed(load(p));
}

inline vec quotient(const Series& series) { return series.num / vmax(series.den, splat(DEN_FLOOR)); }

struct Gradients {
  vec k, v;
};

template <int T>
inline Gradients key_gradients(const Sums<T>& inside, const Sums<T>& before, vec k, vec v, vec w) {
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
inline Upstream upstream(const Series& series, vec raw_q, vec g) {
  vec den = vmax(series.den, splat(DEN_FLOOR));
  Upstream up;
  up.a = g / den;
  up.y = series.den < DEN_FLOOR ? splat(0.0f) : clamp(series.num / den, largest<float>());
  up.dq = clamp(up.a * 2.0f * (series.top - up.y * series.bottom), GRAD_LIMIT);
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
  const uint8_t* document_starts;  // [B, L], 1 where a document starts (not at the shard's first token), or null
  const float* initial;            // [B, 2, T+1, D], or [2, B, 2, T+1, D] if not causal; null for zeros
  const float* final_grad;         // the gradient of the final state, likewise
  float* final;                    // the final state, or backward the gradient of the initial one, likewise, or null
  float* states;  // [B, N, 2, T+1, D], the states before the chunks; written forward, read backward, or null

  bool starts(int64_t b, int64_t i) const { return document_starts && document_starts[b * L + i]; }
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
        for (int64_t c = 0; c < n; ++c) sums[i * n + c] += p[i * D + c] + 0 * p[i * D + c];
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

// A chunk's tokens in fp32, stripe by stripe of W channels. Memory is read and written by whole rows, as hardware prefetches
// them; the passes over a stripe find its tokens side by side, in the first-level cache.
struct Stripes {
  static constexpr int64_t STRIDE = (CHUNK + 1) * W;  // not a multiple of 4 KiB, whose multiples share cache lines
  std::vector<float> values;
  explicit Stripes(int64_t channels) : values(channels / W * STRIDE) {}
  // The stripe at channel c of a panel: token i is at i * W.
  float* at(int64_t c) { return values.data() + c / W * STRIDE; }
  // From and to tokens [first, last) at channels [from, to).
  template <class X>
  void read(const Tokens<const X>& x, int64_t b, int64_t first, int64_t last, int64_t from, int64_t to) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = from; c < to; c += W) store(at(c - from) + (i - first) * W, exposed(x.at(b, i, c)));
  }
  template <class X>
  void write(const Tokens<X>& x, int64_t b, int64_t first, int64_t last, int64_t from, int64_t to) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = from; c < to; c += W) store(x.at(b, i, c), load(at(c - from) + (i - first) * W));
  }
};

// The weights exp(-k^2) of a chunk. Work without dependences between tokens is in separate loops, here and below, whose
// iterations overlap; those of the sums do not.
inline void weigh(const float* k, int64_t num_tokens, vec* weights) {
  for (int64_t i = 0; i < num_tokens; ++i) {
    vec x = load(k + i * W);
    weights[i] = vexp(-x * x);
  }
}

// Causal, forward: y (unless null), the states before the chunks, and the final state.
template <int T, class X>
void forward(const Call<X>& x, const Task& task) {
  const int64_t b = task.row, D = x.D, size = 2 * (T + 1) * D, num_chunks = (x.L + CHUNK - 1) / CHUNK;
  const int64_t panel = std::min(PANEL, task.last - task.first);
  vec weights[CHUNK];
  Series series[CHUNK];
  Wide wide(task, T + 1);
  Stripes q(panel), k(panel), v(panel);
  wide.add(offset(x.initial, b * size + task.first), D);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t first = chunk * CHUNK, last = std::min(x.L, first + CHUNK);
    for (int64_t from = task.first, to; from < task.last; from = to) {
      to = std::min(task.last, from + panel);
      k.read(x.k, b, first, last, from, to);
      v.read(x.v, b, first, last, from, to);
      if (x.y.data) q.read(x.q, b, first, last, from, to);
      for (int64_t c = from; c < to; c += W) {
        float *qs = q.at(c - from), *ks = k.at(c - from), *vs = v.at(c - from);
        double* total = wide.at(c - task.first);
        Sums<T> before, inside;
        before.read(total, wide.n);
        if (x.states) store_state(before, x.states + (b * num_chunks + chunk) * size + c, D);
        weigh(ks, last - first, weights);
        for (int64_t i = 0; i < last - first; ++i) {
          if (x.starts(b, first + i)) {
            before.clear(), inside.clear();
            for (int n = 0; n < 2 * (T + 1); ++n) std::fill_n(total + n * wide.n, W, 0.0);
          }
          add_key(inside, load(ks + i * W), load(vs + i * W), weights[i]);
          if (x.y.data) evaluate<T, false>(series[i], inside, before, clamp(load(qs + i * W), Q_LIMIT));
        }
        inside.add_to(total, wide.n);
        if (x.y.data)
          for (int64_t i = 0; i < last - first; ++i) store(qs + i * W, clamp(quotient(series[i]), largest<X>()));
      }
      if (x.y.data) q.write(x.y, b, first, last, from, to);
    }
  }
  wide.write(offset(x.final, b * size + task.first), D);
}

// A stripe of a chunk from right to left: gradients of k and v in the place of k and v, and of the state after the chunk.
template <int T, class X, bool tame>
void right_to_left(const Call<X>& x, int64_t b, int64_t first, int64_t last, const float* qs, float* ks, float* vs,
                   const Upstream* up, const vec* weights, double* total, int64_t n) {
  Sums<T> before, inside;
  before.read(total, n);
  for (int64_t i = last - first - 1; i >= 0; --i) {
    if (first + i + 1 < x.L && x.starts(b, first + i + 1)) {
      before.clear(), inside.clear();
      for (int m = 0; m < 2 * (T + 1); ++m) std::fill_n(total + m * n, W, 0.0);
    }
    add_query<T, tame>(inside, clamp(load(qs + i * W), Q_LIMIT), up[i].a, up[i].y);
    if (x.dk.data) {
      Gradients grads = key_gradients(inside, before, load(ks + i * W), load(vs + i * W), weights[i]);
      store(ks + i * W, clamp(grads.k, largest<X>()));
      store(vs + i * W, clamp(grads.v, largest<X>()));
    }
  }
  inside.add_to(total, n);
}

// Causal, backward: gradients of q, k, v (unless null) and of the initial state.
template <int T, class X>
void backward(const Call<X>& x, const Task& task) {
  const int64_t b = task.row, D = x.D, size = 2 * (T + 1) * D, num_chunks = (x.L + CHUNK - 1) / CHUNK;
  const int64_t panel = std::min(PANEL, task.last - task.first);
  Upstream up[CHUNK];
  vec weights[CHUNK];
  Series series[CHUNK];
  Wide wide(task, T + 1);
  Stripes q(panel), k(panel), v(panel), g(panel);
  wide.add(offset(x.final_grad, b * size + task.first), D);
  for (int64_t chunk = num_chunks - 1; chunk >= 0; --chunk) {
    const int64_t first = chunk * CHUNK, last = std::min(x.L, first + CHUNK);
    for (int64_t from = task.first, to; from < task.last; from = to) {
      to = std::min(task.last, from + panel);
      q.read(x.q, b, first, last, from, to);
      k.read(x.k, b, first, last, from, to);
      v.read(x.v, b, first, last, from, to);
      g.read(x.g, b, first, last, from, to);
      for (int64_t c = from; c < to; c += W) {
        float *qs = q.at(c - from), *ks = k.at(c - from), *vs = v.at(c - from), *gs = g.at(c - from);
        ivec wild{};
        Sums<T> before, inside;
        load_state(before, x.states + (b * num_chunks + chunk) * size + c, D);
        weigh(ks, last - first, weights);
        for (int64_t i = 0; i < last - first; ++i) {
          if (x.starts(b, first + i)) before.clear(), inside.clear();
          add_key(inside, load(ks + i * W), load(vs + i * W), weights[i]);
          evaluate<T, true>(series[i], inside, before, clamp(load(qs + i * W), Q_LIMIT));
        }
        for (int64_t i = 0; i < last - first; ++i) {
          vec raw = load(qs + i * W);
          up[i] = upstream(series[i], raw, load(gs + i * W));
          store(gs + i * W, clamp(up[i].dq, largest<X>()));
          wild |= (vabs(up[i].a) > TAME) | (vabs(up[i].y) > TAME) | (vabs(raw) > TAME_Q);
        }
        auto run_back = any(wild) ? right_to_left<T, X, false> : right_to_left<T, X, true>;
        run_back(x, b, first, last, qs, ks, vs, up, weights, wide.at(c - task.first), wide.n);
      }
      if (x.dq.data) g.write(x.dq, b, first, last, from, to);
      if (x.dk.data) k.write(x.dk, b, first, last, from, to), v.write(x.dv, b, first, last, from, to);
    }
  }
  wide.write(offset(x.final, b * size + task.first), D);
}

// Not causal: a document's sums first, then each of its tokens. The shard's first document also sees the state from the
// left, its last one the state from the right; gradients of states likewise.
template <int T, class X>
void whole_documents(const Call<X>& x, const Task& task, bool gradients) {
  const int64_t b = task.row, D = x.D, size = 2 * (T + 1) * D, other = x.B * size, here = b * size + task.first;
  Wide sums(task, T + 1), grads(task, T + 1);
  auto for_chunks = [&](int64_t start, int64_t stop, auto body) {
    for (int64_t first = start; first < stop; first += CHUNK)
      for (int64_t c = task.first; c < task.last; c += W)
        body(first, std::min(stop, first + CHUNK), c);
  };
  for (int64_t start = 0, stop; start < x.L; start = stop) {
    for (stop = start + 1; stop < x.L && !x.starts(b, stop); ++stop) {}
    const bool is_first = start == 0, is_last = stop == x.L;
    sums.clear();
    if (is_first) sums.add(offset(x.initial, here), D);
    if (is_last) sums.add(offset(x.initial, other + here), D);
    for_chunks(start, stop, [&](int64_t first, int64_t last, int64_t c) {
      Sums<T> inside;
      for (int64_t i = first; i < last; ++i) {
        vec k = exposed(x.k.at(b, i, c)), v = exposed(x.v.at(b, i, c));
        add_key(inside, k, v, vexp(-k * k));
      }
      inside.add_to(sums.at(c - task.first), sums.n);
    });
    if (!gradients) {
      // The final state to the right is of the last document, to the left of the first.
      if (is_last) sums.write(offset(x.final, here), D);
      if (is_first) sums.write(offset(x.final, other + here), D);
      if (!x.y.data) continue;
      for_chunks(start, stop, [&](int64_t first, int64_t last, int64_t c) {
        Sums<T> all, none;
        all.read(sums.at(c - task.first), sums.n);
        for (int64_t i = first; i < last; ++i) {
          Series series;
          evaluate<T, false>(series, all, none, clamp(exposed(x.q.at(b, i, c)), Q_LIMIT));
          store_finite(x.y.at(b, i, c), quotient(series));
        }
      });
      continue;
    }
    grads.clear();
    if (is_last) grads.add(offset(x.final_grad, here), D);
    if (is_first) grads.add(offset(x.final_grad, other + here), D);
    for_chunks(start, stop, [&](int64_t first, int64_t last, int64_t c) {
      Sums<T> all, none, inside;
      all.read(sums.at(c - task.first), sums.n);
      for (int64_t i = first; i < last; ++i) {
        vec raw = exposed(x.q.at(b, i, c)), q = clamp(raw, Q_LIMIT);
        Series series;
        evaluate<T, true>(series, all, none, q);
        Upstream up = upstream(series, raw, exposed(x.g.at(b, i, c)));
        if (x.dq.data) store_finite(x.dq.at(b, i, c), up.dq);
        add_query<T, false>(inside, q, up.a, up.y);
      }
      inside.add_to(grads.at(c - task.first), grads.n);
    });
    // The initial state from the left reaches the first document, from the right the last.
    if (is_first) grads.write(offset(x.final, here), D);
    if (is_last) grads.write(offset(x.final, other + here), D);
    if (!x.dk.data) continue;
    for_chunks(start, stop, [&](int64_t first, int64_t last, int64_t c) {
      Sums<T> all, none;
      all.read(grads.at(c - task.first), grads.n);
      for (int64_t i = first; i < last; ++i) {
        vec k = exposed(x.k.at(b, i, c)), v = exposed(x.v.at(b, i, c));
        Gradients to = key_gradients(all, none, k, v, vexp(-k * k));
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

// shape: B, L, D. data: q k v g y dq dk dv document_starts initial final_grad final states, null where not used; strides: of
// the first eight, over rows and over tokens, in elements. Backward, final receives the gradient of the initial state.
extern "C" void elementwise(int is_bf16, int causal, int gradients, const int64_t* shape, const void* const* data,
                            const int64_t* strides) {
  if (is_bf16)
    run<bf16>(shape, data, strides, causal, gradients);
  else
    run<float>(shape, data, strides, causal, gradients);
}
