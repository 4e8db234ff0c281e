// The delta rule on CPUs, with one decay a head: a thread runs over the chunks of one head, in WY form (README.md).
//
// A chunk's rows are packed once as fp32, padded with zeros to whole vectors, as is a last chunk to C tokens: rows of zeros
// change nothing. Sums inside a chunk are fp32, those over chunks fp64. Backward, the states before INTERVAL chunks are
// computed again from a checkpoint, and what a chunk is made of is kept until its adjoint.
//
// The gradient of log_decay is the sum of all that passes a token: between tokens of its chunk, from the state before the
// chunk to later tokens, from earlier tokens to the state after it, and from one state to the other.
//
// Where documents begin in a chunk, weights between them are 0. If something of it is not finite, its documents are
// computed one by one, with zeros in the place of the others, since 0 times NaN is NaN.
#include "matrix.h"

#include <cmath>
#include <memory>

namespace {

constexpr int C = 64;
constexpr float LEAST_LOG_DECAY = -1000;  // whose exponential is 0 in fp64, too
constexpr double NORM_EPS = 1e-6;

// What fills a register as doubles.
typedef float half_vec __attribute__((vector_size(2 * W)));
typedef double half_dvec __attribute__((vector_size(4 * W)));

// A tensor [B, L, heads, n] with contiguous last axis; strides in elements.
struct Rows {
  const float* data;
  int64_t row, token, head;
};

struct Call {
  int64_t B, L, H, sharing, K, V, interval;  // heads of values that share one of q and k; chunks between checkpoints
  Rows q, k, v, grad;
  const float *beta, *log_decay;                   // [B, L, H]; log_decay may be null
  float *y, *dq, *dk, *dv, *dbeta, *dlog_decay;    // contiguous, those of q and k for each of H heads; or null
  const uint8_t* starts;                           // [B, L], 1 where a document starts, or null
  const float *initial, *final_grad;               // [B, H, K, V]
  float *final, *transition, *initial_grad;        // [B, H, K, V], [B, H, K, K], [B, H, K, V], or null
  float* checkpoints;                              // [number, B, H, K, V], or null
  float scale;
  bool normalize;

  bool backward() const { return grad.data || initial_grad; }  // without tokens, their tensors are null
};

struct alignas(64) Line {
  float x[16];
};
class Memory {
 public:
  explicit Memory(int64_t floats) : lines(new Line[up(floats, 16) / 16]), next(lines[0].x) {}
  float* take(int64_t n) { return std::exchange(next, next + up(n, 16)); }

 private:
  std::unique_ptr<Line[]> lines;
  float* next;
};

inline float total(vec x) {
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
}
inline float dot(const float* a, const float* b, int64_t n) {
  vec sum = {};
  for (int64_t c = 0; c < n; c += W) sum += load(a + c) * load(b + c);
  return total(sum);
}
inline half_dvec load_wide(const float* p) {
  half_vec x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, half_dvec);
}
inline void store_narrow(float* p, half_dvec x) {
  const half_vec narrow = __builtin_convertvector(x, half_vec);
  std::memcpy(p, &narrow, sizeof narrow);
}
inline double squared_length(const float* row, int64_t n) {
  half_dvec sum = {};
  for (int64_t c = 0; c < n; c += W / 2) {
    const half_dvec x = load_wide(row + c);
    sum += x * x;
  }
  double all = 0;
  for (int i = 0; i < W / 2; ++i) all += sum[i];
  return all;
}
// to = factor * from
inline void scaled(const float* from, float factor, float* to, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(to + c, load(from + c) * factor);
}
inline void add_scaled(const float* from, float factor, float* to, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(to + c, load(to + c) + load(from + c) * factor);
}

// What a chunk is made of; the names are those of README.md.
struct Chunk {
  int64_t first, count;
  int64_t lo, hi;    // the tokens to compute: all, or those of a document
  bool enters, leaves;  // whether they see the state before the chunk, and whether they contribute to the one after it
  bool cut;          // whether a document begins in the chunk
  bool apart;        // whether its documents are computed one by one
  double passing;  // exp(G_C), 0 where a document begins
  alignas(64) float E[C], F[C], beta[C], inverse_q[C], inverse_k[C];
  float *q, *k, *v, *D, *M, *P, *T, *bEK, *bV, *EQ, *FK, *Wk, *R, *S;

  static int64_t floats(int64_t Kw, int64_t Vw, int64_t Sw) { return C * (6 * Kw + 2 * Vw + Sw + 4 * C) + Kw * Sw; }
  void take(Memory& memory, int64_t Kw, int64_t Vw, int64_t Sw) {
    for (float** x : {&q, &k, &bEK, &EQ, &FK, &Wk}) *x = memory.take(C * Kw);
    for (float** x : {&v, &bV}) *x = memory.take(C * Vw);
    for (float** x : {&D, &M, &P, &T}) *x = memory.take(C * C);
    R = memory.take(C * Sw), S = memory.take(Kw * Sw);
  }
};

class Head {
 public:
  explicit Head(const Call& x)
      : x(x), Kw(up(x.K, W)), Vw(up(x.V, W)), Sw(Vw + (x.transition ? Kw : 0)), kept(x.backward() ? x.interval : 1),
        memory(kept * Chunk::floats(Kw, Vw, Sw) + 5 * C * Kw + 4 * C * Vw + 8 * C * C + 3 * Kw * Sw + 5 * Kw * Vw),
        chunks(kept) {
    for (Chunk& one : chunks) one.take(memory, Kw, Vw, Sw);
    state = memory.take(Kw * Sw), wide = (double*)memory.take(2 * Kw * Sw);
    transposed_k = memory.take(Kw * C), g = memory.take(C * Vw), dR = memory.take(C * Vw), Z = memory.take(C * Vw);
    transposed_R = memory.take(Vw * C), transposed_S = memory.take(Vw * Kw), transposed_dS = memory.take(Vw * Kw);
    pairs = memory.take(C * C), query_pairs = memory.take(C * C), between = memory.take(C * C), queries = memory.take(C * Kw);
    dS = memory.take(Kw * Vw), gradient = (double*)memory.take(2 * Kw * Vw);
    minus_M = (double*)memory.take(2 * C * C), inverse = (double*)memory.take(2 * C * C);
    key_rows = memory.take(C * Kw), key_columns = memory.take(C * Kw), read = memory.take(C * Kw);
  }

  void forward(int64_t row, int64_t head) {
    b = row, h = head;
    enter(of(x.initial, x.V));
    Chunk& at = chunks[0];
    for (int64_t n = 0; n * C < x.L; ++n) {
      if (x.checkpoints && n && n % x.interval == 0) narrow_out(wide, Sw, checkpoint(n), x.V);
      advance(at, n, x.y, true, [&] {
        if (x.y) outputs(at);
      });
    }
    if (x.final) narrow_out(wide, Sw, of(x.final, x.V), x.V);
    if (x.transition) narrow_out(wide + Vw, Sw, of(x.transition, x.K), x.K);
  }

  void backward(int64_t row, int64_t head) {
    b = row, h = head;
    const int64_t number = up(x.L, C) / C;
    std::memset(gradient, 0, sizeof(double) * Kw * Vw);
    if (x.final_grad) widen(of(x.final_grad, x.V), x.V, gradient, Vw);
    for (int64_t last = number; last > 0;) {
      const int64_t first = (last - 1) / x.interval * x.interval;
      if (x.dq) enter(first ? checkpoint(first) : of(x.initial, x.V));
      for (int64_t n = first; n < last; ++n) {
        Chunk& at = chunks[n - first];
        if (x.dq)
          advance(at, n, true, n + 1 < last, [] {});
        else
          prepare(at, n, true);
      }
      for (int64_t n = last; n-- > first;) retreat(chunks[n - first], n);
      last = first;
    }
    if (x.initial_grad) narrow_out(gradient, Vw, of(x.initial_grad, x.V), x.V);
  }

 private:
  // This head's matrix of [B, H, K, columns].
  template <class X>
  X* of(X* all, int64_t columns) const {
    return all ? all + (b * x.H + h) * x.K * columns : nullptr;
  }
  float* checkpoint(int64_t n) const {
    return of(x.checkpoints + (n / x.interval - 1) * x.B * x.H * x.K * x.V, x.V);
  }
  // The state before a chunk: from [K, V], or zeros; the columns behind it are the identity.
  void enter(const float* from) {
    std::memset(wide, 0, sizeof(double) * Kw * Sw);
    if (from) widen(from, x.V, wide, Sw);
    if (x.transition)
      for (int64_t r = 0; r < x.K; ++r) wide[r * Sw + Vw + r] = 1;
    for (int64_t i = 0; i < Kw * Sw; i += W) store(state + i, narrow(wide + i));
  }
  void widen(const float* from, int64_t columns, double* to, int64_t ld) const {
    for (int64_t r = 0; r < x.K; ++r) std::copy_n(from + r * columns, columns, to + r * ld);
  }
  void narrow_out(const double* from, int64_t ld, float* to, int64_t columns) const {
    for (int64_t r = 0; r < x.K; ++r) std::copy_n(from + r * ld, columns, to + r * columns);
  }

  const float* row_of(const Rows& rows, int64_t head, int64_t token) const {
    return rows.data + b * rows.row + token * rows.token + head * rows.head;
  }
  // Rows of n floats, padded with zeros to C rows of ld.
  void pack(const Rows& rows, int64_t head, const Chunk& at, int64_t n, float* to, int64_t ld) const {
    std::memset(to, 0, sizeof(float) * at.lo * ld);
    for (int64_t i = at.lo; i < at.hi; ++i) {
      std::memcpy(to + i * ld, row_of(rows, head, at.first + i), sizeof(float) * n);
      std::memset(to + i * ld + n, 0, sizeof(float) * (ld - n));
    }
    std::memset(to + at.hi * ld, 0, sizeof(float) * (C - at.hi) * ld);
  }
  void pack_features(const Rows& rows, const Chunk& at, float factor, float* to, float* inverse) const {
    pack(rows, h / x.sharing, at, x.K, to, Kw);
    for (int64_t i = at.lo; i < at.hi; ++i) {
      float* row = to + i * Kw;
      // In fp64: with beta 2, an error of a key's length counts as often as the key is repeated.
      const double norm = x.normalize ? 1 / std::sqrt(squared_length(row, Kw) + NORM_EPS) : 1, all = norm * factor;
      inverse[i] = float(norm);
      if (all != 1)
        for (int64_t c = 0; c < Kw; c += W / 2) store_narrow(row + c, load_wide(row + c) * all);
    }
  }

  bool starts(const Chunk& at, int64_t i) const { return x.starts && x.starts[b * x.L + at.first + i]; }

  // Makes chunk n and moves the state behind it, or not; calls `body` in between, of each document where these are apart.
  template <class Body>
  void advance(Chunk& at, int64_t n, bool with_queries, bool write, Body body) {
    prepare(at, n, with_queries);
    if (x.dq) std::memcpy(at.S, state, sizeof(float) * Kw * Sw);
    at.apart = at.cut && !(is_finite(at.k, C * Kw) && is_finite(at.v, C * Vw) && is_finite(at.beta, C) &&
                           is_finite(at.D, C * C) && is_finite(state, Kw * Sw) && (!with_queries || is_finite(at.q, C * Kw)));
    for_documents(at, n, with_queries, false, [&] {
      read_state(at, at.enters || !at.apart ? state : zeros.data());
      body();
      if (write && at.leaves) write_state(at);
    });
  }
  // The adjoint of `advance`.
  void retreat(Chunk& at, int64_t n) {
    if (at.cut) {
      pack(x.grad, h, at, x.V, g, Vw);
      for (int64_t i = 0; i < Kw * Vw; i += W) store(dS + i, narrow(gradient + i));
      at.apart = at.apart || !(is_finite(g, C * Vw) && is_finite(dS, Kw * Vw));
    }
    const bool apart = at.apart;
    for_documents(at, n, true, true, [&] {
      if (apart && x.dq) read_state(at, at.enters ? at.S : zeros.data());
      adjoint(at);
    });
  }
  // Calls f once, or for each document of the chunk, with rows of zeros in the place of the others.
  template <class F>
  void for_documents(Chunk& at, int64_t n, bool with_queries, bool to_left, F f) {
    if (!at.apart) return f();
    zeros.assign(Kw * Sw, 0);
    std::vector<int64_t> bounds{0};
    for (int64_t i = 1; i < at.count; ++i)
      if (starts(at, i)) bounds.push_back(i);
    bounds.push_back(at.count);
    for (size_t d = 0; d + 1 < bounds.size(); ++d) {
      const size_t document = to_left ? bounds.size() - 2 - d : d;
      prepare(at, n, with_queries, bounds[document], bounds[document + 1]);
      f();
    }
  }
  static bool is_finite(const float* p, int64_t n) {
    vec zero{};
    for (int64_t i = 0; i < n; i += W) zero += load(p + i) * 0.0f;
    return total(zero) == 0;
  }

  void prepare(Chunk& at, int64_t n, bool with_queries, int64_t lo = 0, int64_t hi = C) {
    at.first = n * C, at.count = std::min<int64_t>(C, x.L - at.first);
    at.lo = lo, at.hi = std::min(hi, at.count);
    at.enters = lo == 0 && !starts(at, 0), at.leaves = at.hi == at.count;
    if (with_queries) pack_features(x.q, at, x.scale, at.q, at.inverse_q);
    pack_features(x.k, at, 1, at.k, at.inverse_k);
    pack(x.v, h, at, x.V, at.v, Vw);
    double G[C];
    int32_t document[C];
    double sum = 0;
    int32_t id = 0;
    for (int64_t i = 0; i < C; ++i) {
      const int64_t index = (b * x.L + at.first + i) * x.H + h;
      const bool taken = at.lo <= i && i < at.hi;
      at.beta[i] = taken ? x.beta[index] : 0;
      if (i < at.count && starts(at, i)) ++id, sum = 0;
      if (taken && x.log_decay) sum += vmax_float(x.log_decay[index], LEAST_LOG_DECAY);
      G[i] = sum, document[i] = id;
    }
    at.cut = id > 0, at.passing = id ? 0 : std::exp(sum);
    for (int64_t i = 0; i < C; ++i) at.E[i] = float(G[i]), at.F[i] = float(sum - G[i]);
    for (int64_t i = 0; i < C; i += W)
      store(at.E + i, vexp(load(at.E + i))), store(at.F + i, vexp(load(at.F + i)));
    for (int64_t i = 0; i < C; ++i) {
      if (document[i]) at.E[i] = 0;
      if (document[i] != id) at.F[i] = 0;
      float* row = at.D + i * C;
      for (int64_t j = 0; j < C; ++j) row[j] = j > i || document[j] != document[i] ? -200 : float(G[i] - G[j]);
      for (int64_t j = 0; j < C; j += W) store(row + j, vexp(load(row + j)));  // 0 below -87
      if (with_queries) scaled(at.q + i * Kw, at.E[i], at.EQ + i * Kw, Kw);
      scaled(at.k + i * Kw, at.beta[i] * at.E[i], at.bEK + i * Kw, Kw);
      scaled(at.k + i * Kw, at.F[i], at.FK + i * Kw, Kw);
      scaled(at.v + i * Vw, at.beta[i], at.bV + i * Vw, Vw);
    }
    transpose(at.k, Kw, C, Kw, transposed_k, C);
    auto decayed = [&](float* to) {
      return [to, &at](int64_t r, int64_t c, vec sum) { store(to + r * C + c, sum * load(at.D + r * C + c)); };
    };
    product(plain(at.k, Kw), transposed_k, C, C, C, x.K, LOWER_RESULT, decayed(at.M));
    if (with_queries) product(plain(at.q, Kw), transposed_k, C, C, C, x.K, LOWER_RESULT, decayed(at.P));
    for (int64_t i = 0; i < C; ++i) at.M[i * C + i] = 0;
    invert(at);
    auto write = [](float* to, int64_t ld) {
      return [to, ld](int64_t r, int64_t c, vec sum) { store(to + r * ld + c, sum); };
    };
    product(plain(at.T, C), at.bV, Vw, C, Vw, C, LOWER, write(at.R, Sw));
    product(plain(at.T, C), at.bEK, Kw, C, Kw, C, LOWER, write(at.Wk, Kw));
    if (Sw > Vw)
      for (int64_t i = 0; i < C; ++i) std::memset(at.R + i * Sw + Vw, 0, sizeof(float) * (Sw - Vw));
  }
  static float vmax_float(float a, float b) { return a < b ? b : a; }  // NaN in a is kept

  // T = (I + beta M)^-1 by forward substitution, tiles of rows and columns at a time. In fp64: equal keys with beta 2 make
  // terms of alternating signs whose roundings would add up from chunk to chunk.
  void invert(Chunk& at) const {
    constexpr int N = W / 2, ROWS = 8;
    for (int64_t i = 0; i < C; ++i)
      for (int64_t j = 0; j < i; j += N) {
        const half_dvec m = load_wide(at.M + i * C + j) * -double(at.beta[i]);
        std::memcpy(minus_M + i * C + j, &m, sizeof m);
      }
    for (int64_t first = 0; first < C; first += ROWS)
      for (int64_t c = 0; c < first + ROWS; c += N) {
        half_dvec sums[ROWS] = {};
        for (int64_t j = c / ROWS * ROWS; j < first; ++j) {
          half_dvec row;
          std::memcpy(&row, inverse + j * C + c, sizeof row);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) sums[r] += row * minus_M[(first + r) * C + j];
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
          for (int s = 0; s < r; ++s) sums[r] += sums[s] * minus_M[(first + r) * C + first + s];
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n)
            if (c + n == first + r) sums[r][n] = 1;
          std::memcpy(inverse + (first + r) * C + c, &sums[r], sizeof sums[r]);
          store_narrow(at.T + (first + r) * C + c, sums[r]);
        }
      }
  }

  // R = U - W S
  void read_state(Chunk& at, const float* seen) const {
    product(plain(at.Wk, Kw), seen, Sw, C, Sw, x.K, FULL, [&](int64_t r, int64_t c, vec sum) {
      store(at.R + r * Sw + c, load(at.R + r * Sw + c) - sum);
    });
  }
  // S <- exp(G_C) S + (F K)^T R
  void write_state(const Chunk& at) {
    product(transposed(at.FK, Kw), at.R, Sw, Kw, Sw, C, FULL, [&](int64_t r, int64_t c, vec sum) {
      double* p = wide + r * Sw + c;
      pass_on(p, at.passing, sum);
      store(state + r * Sw + c, narrow(p));
    });
  }
  // p = passing * p + x
  static void pass_on(double* p, double passing, vec x) {
    dvec sum;
    std::memcpy(&sum, p, sizeof sum);
    sum = (passing ? sum * passing : dvec{}) + __builtin_convertvector(x, dvec);
    std::memcpy(p, &sum, sizeof sum);
  }

  void outputs(const Chunk& at) {
    product(plain(at.EQ, Kw), at.enters || !at.apart ? state : zeros.data(), Sw, C, Vw, x.K, FULL,
            [&](int64_t r, int64_t c, vec sum) { store(g + r * Vw + c, sum); });
    product(plain(at.P, C), at.R, Sw, C, Vw, C, LOWER,
            [&](int64_t r, int64_t c, vec sum) { store(g + r * Vw + c, load(g + r * Vw + c) + sum); });
    unpack(at, g, Vw, x.V, x.y);
  }
  void unpack(const Chunk& at, const float* from, int64_t ld, int64_t n, float* to) const {
    for (int64_t i = at.lo; i < at.hi; ++i)
      std::memcpy(to + ((b * x.L + at.first + i) * x.H + h) * n, from + i * ld, sizeof(float) * n);
  }

  // Moves the gradient of the state before the chunk; the gradients of its inputs, where they are asked for.
  void adjoint(Chunk& at) {
    for (int64_t i = 0; i < Kw * Vw; i += W) store(dS + i, at.leaves ? narrow(gradient + i) : vec{});
    pack(x.grad, h, at, x.V, g, Vw);
    product(transposed(at.P, C), g, Vw, C, Vw, C, UPPER,
            [&](int64_t r, int64_t c, vec sum) { store(dR + r * Vw + c, sum); });
    product(plain(at.FK, Kw), dS, Vw, C, Vw, x.K, FULL,
            [&](int64_t r, int64_t c, vec sum) { store(dR + r * Vw + c, load(dR + r * Vw + c) + sum); });
    product(transposed(at.T, C), dR, Vw, C, Vw, C, UPPER,
            [&](int64_t r, int64_t c, vec sum) { store(Z + r * Vw + c, sum); });
    double between_states = 0;
    if (x.dlog_decay && at.passing)
      for (int64_t i = 0; i < x.K; ++i) between_states += at.passing * dot(at.S + i * Sw, dS + i * Vw, Vw);
    if (at.enters || !at.apart) {
      product(transposed(at.EQ, Kw), g, Vw, Kw, Vw, C, FULL,
              [&](int64_t r, int64_t c, vec sum) { pass_on(gradient + r * Vw + c, at.passing, sum); });
      product(transposed(at.bEK, Kw), Z, Vw, Kw, Vw, C, FULL,
              [&](int64_t r, int64_t c, vec sum) { pass_on(gradient + r * Vw + c, 1, -sum); });
    } else if (at.lo == 0) {
      std::fill_n(gradient, Kw * Vw, 0.0);
    }
    if (!x.dq) return;
    const float* S = at.enters || !at.apart ? at.S : zeros.data();

    transpose(at.R, Sw, C, Vw, transposed_R, C);
    transpose(S, Sw, Kw, Vw, transposed_S, Kw);
    transpose(dS, Vw, Kw, Vw, transposed_dS, Kw);
    auto write = [](float* to, int64_t ld) {
      return [to, ld](int64_t r, int64_t c, vec sum) { store(to + r * ld + c, sum); };
    };
    auto add = [](float* to, int64_t ld) {
      return [to, ld](int64_t r, int64_t c, vec sum) { store(to + r * ld + c, load(to + r * ld + c) + sum); };
    };
    product(plain(Z, Vw), transposed_R, C, C, C, x.V, LOWER_RESULT, write(pairs, C));
    product(plain(g, Vw), transposed_R, C, C, C, x.V, LOWER_RESULT, [&](int64_t r, int64_t c, vec sum) {
      store(query_pairs + r * C + c, sum * load(at.D + r * C + c));
      store(between + r * C + c, sum * load(at.P + r * C + c));
    });
    product(plain(Z, Vw), transposed_S, Kw, C, Kw, x.V, FULL, write(read, Kw));
    // What passes from the state before the chunk to a token, and from a token to the state after it.
    float dbeta[C], from_state[C], to_state[C];
    for (int64_t i = 0; i < C; ++i) {
      const int64_t seen = up(i + 1, W);
      for (int64_t j = i; j < seen; ++j) pairs[i * C + j] = 0;
      const float along = at.E[i] * dot(read + i * Kw, at.k + i * Kw, Kw);
      dbeta[i] = dot(Z + i * Vw, at.v + i * Vw, Vw) - along - dot(pairs + i * C, at.M + i * C, seen);
      from_state[i] = -at.beta[i] * along;
      for (int64_t j = 0; j < seen; j += W) {
        const vec grad = load(pairs + i * C + j) * -at.beta[i];
        store(between + i * C + j, load(between + i * C + j) + grad * load(at.M + i * C + j));
        store(pairs + i * C + j, grad * load(at.D + i * C + j));
      }
    }
    product(plain(pairs, C), at.k, Kw, C, Kw, C, LOWER, write(key_rows, Kw));
    for (int64_t i = 0; i < C; ++i) add_scaled(read + i * Kw, -at.beta[i] * at.E[i], key_rows + i * Kw, Kw);
    product(plain(at.R, Sw), transposed_dS, Kw, C, Kw, x.V, FULL, write(key_columns, Kw));
    for (int64_t i = 0; i < C; ++i) {
      scaled(key_columns + i * Kw, at.F[i], key_columns + i * Kw, Kw);
      to_state[i] = dot(key_columns + i * Kw, at.k + i * Kw, Kw);
    }
    product(transposed(pairs, C), at.k, Kw, C, Kw, C, UPPER, add(key_columns, Kw));
    product(transposed(query_pairs, C), at.q, Kw, C, Kw, C, UPPER, add(key_columns, Kw));
    product(plain(g, Vw), transposed_S, Kw, C, Kw, x.V, FULL, [&](int64_t r, int64_t c, vec sum) {
      store(queries + r * Kw + c, sum * at.E[r]);
    });
    for (int64_t i = 0; i < C; ++i) from_state[i] += dot(queries + i * Kw, at.q + i * Kw, Kw);
    product(plain(query_pairs, C), at.k, Kw, C, Kw, C, LOWER, add(queries, Kw));

    if (x.dlog_decay) sum_log_decay_grads(at, from_state, to_state, between_states);
    for (int64_t i = at.lo; i < at.hi; ++i) {
      const int64_t index = (b * x.L + at.first + i) * x.H + h;
      float *dq = queries + i * Kw, *rows = key_rows + i * Kw, *columns = key_columns + i * Kw;
      const float *q = at.q + i * Kw, *k = at.k + i * Kw;
      const double along_q = dot(dq, q, Kw), along_rows = dot(rows, k, Kw), along_columns = dot(columns, k, Kw);
      x.dbeta[index] = dbeta[i];
      add_scaled(columns, 1, rows, Kw);
      // q is normalized and scaled, k is normalized.
      if (x.normalize && x.scale) add_scaled(q, float(-along_q / (double(x.scale) * x.scale)), dq, Kw);
      if (x.normalize) add_scaled(k, float(-(along_rows + along_columns)), rows, Kw);
      scaled(dq, at.inverse_q[i] * x.scale, dq, Kw);
      scaled(rows, at.inverse_k[i], rows, Kw);
      scaled(Z + i * Vw, at.beta[i], Z + i * Vw, Vw);
    }
    unpack(at, queries, Kw, x.K, x.dq), unpack(at, key_rows, Kw, x.K, x.dk), unpack(at, Z, Vw, x.V, x.dv);
  }

  // The gradients of log_decay; `between` has what passes from the token of a column to that of a row.
  void sum_log_decay_grads(const Chunk& at, const float* from_state, const float* to_state, double between_states) const {
    double from_earlier[C], to_later = 0, sum = 0;
    for (int64_t i = at.lo; i < at.hi; ++i) {
      if (starts(at, i)) sum = 0;
      from_earlier[i] = sum, sum += to_state[i];
    }
    alignas(64) float to_rows[C] = {};  // of each column, to the token and later ones
    ivec lanes;
    for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
    for (int64_t i = at.hi; i-- > at.lo;) {
      vec between_tokens{};
      for (int64_t c = 0; c < i; c += W) {
        const vec sums = load(to_rows + c) + load(between + i * C + c);
        store(to_rows + c, sums);
        between_tokens += lanes + int32_t(c) < int32_t(i) ? sums : vec{};
      }
      to_later += from_state[i];
      const double all = total(between_tokens) + to_later + from_earlier[i] + between_states;
      x.dlog_decay[(b * x.L + at.first + i) * x.H + h] = starts(at, i) ? 0 : float(all);
      if (starts(at, i)) to_later = 0;
    }
  }

  const Call& x;
  const int64_t Kw, Vw, Sw, kept;
  Memory memory;
  std::vector<float> zeros;
  std::vector<Chunk> chunks;
  float *state, *transposed_k, *g, *dR, *Z, *transposed_R, *transposed_S, *transposed_dS, *pairs, *query_pairs, *between, *queries,
      *key_rows, *key_columns, *read;
  float* dS;                // gradient of the state behind the chunk, of `gradient`
  double *wide, *gradient;  // the state, which `state` rounds; the gradient of the state
  double *minus_M, *inverse;  // -beta M and T of the current chunk
  int64_t b = 0, h = 0;
};

}  // namespace

// sizes: B, L, H, heads of v for each of q, K, V, chunks between checkpoints. pointers: those of `Call`, in its order.
// strides: those of q, k, v and the gradient of y.
extern "C" void delta_rule(const int64_t* sizes, void* const* pointers, const int64_t* strides, float scale,
                           bool normalize) {
  Call x;
  x.B = sizes[0], x.L = sizes[1], x.H = sizes[2], x.sharing = sizes[3], x.K = sizes[4], x.V = sizes[5];
  x.interval = sizes[6], x.scale = scale, x.normalize = normalize;
  auto next = [&] { return (float*)*pointers++; };
  for (Rows* rows : {&x.q, &x.k, &x.v, &x.grad}) *rows = {next(), strides[0], strides[1], strides[2]}, strides += 3;
  x.beta = next(), x.log_decay = next(), x.y = next();
  x.dq = next(), x.dk = next(), x.dv = next(), x.dbeta = next(), x.dlog_decay = next();
  x.starts = (const uint8_t*)next(), x.initial = next(), x.final_grad = next(), x.final = next();
  x.transition = next(), x.initial_grad = next(), x.checkpoints = next();
#pragma omp parallel
  {
    Head head(x);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < x.B * x.H; ++i)
      x.backward() ? head.backward(i / x.H, i % x.H) : head.forward(i / x.H, i % x.H);
  }
}
