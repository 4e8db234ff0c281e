// The delta rule on CPUs, with one decay a head: a thread runs over the chunks of one head, in WY form (README.md).
//
// A chunk's rows are packed once as fp32, padded with zeros to whole vectors, as is a last chunk to C tokens: rows of zeros
// change nothing. Sums inside a chunk are fp32, those over chunks fp64. Backward, the states before INTERVAL chunks are
// computed again from a checkpoint, and what a chunk is made of is kept until its adjoint.
#include "matrix.h"

#include <cmath>
#include <memory>

namespace {

constexpr int C = 64;
constexpr float LEAST_LOG_DECAY = -1000;  // whose exponential is 0 in fp64, too
constexpr float NORM_EPS = 1e-6f;

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
        memory(kept * Chunk::floats(Kw, Vw, Sw) + 5 * C * Kw + 4 * C * Vw + 3 * C * C + 3 * Kw * Sw + 5 * Kw * Vw),
        chunks(kept) {
    for (Chunk& one : chunks) one.take(memory, Kw, Vw, Sw);
    state = memory.take(Kw * Sw), wide = (double*)memory.take(2 * Kw * Sw);
    transposed_k = memory.take(Kw * C), g = memory.take(C * Vw), dR = memory.take(C * Vw), Z = memory.take(C * Vw);
    transposed_R = memory.take(Vw * C), transposed_S = memory.take(Vw * Kw), transposed_dS = memory.take(Vw * Kw);
    pairs = memory.take(C * C), query_pairs = memory.take(C * C), queries = memory.take(C * Kw);
    dS = memory.take(Kw * Vw), gradient = (double*)memory.take(2 * Kw * Vw);
    key_rows = memory.take(C * Kw), key_columns = memory.take(C * Kw), read = memory.take(C * Kw);
  }

  void forward(int64_t row, int64_t head) {
    b = row, h = head;
    enter(of(x.initial, x.V));
    Chunk& at = chunks[0];
    for (int64_t n = 0; n * C < x.L; ++n) {
      if (x.checkpoints && n && n % x.interval == 0) narrow_out(wide, Sw, checkpoint(n), x.V);
      prepare(at, n, x.y);
      read_state(at);
      if (x.y) outputs(at);
      write_state(at);
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
        prepare(at, n, true);
        if (!x.dq) continue;
        std::memcpy(at.S, state, sizeof(float) * Kw * Sw);
        read_state(at);
        if (n + 1 < last) write_state(at);
      }
      for (int64_t n = last; n-- > first;) adjoint(chunks[n - first]);
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
    for (int64_t i = 0; i < at.count; ++i) {
      std::memcpy(to + i * ld, row_of(rows, head, at.first + i), sizeof(float) * n);
      std::memset(to + i * ld + n, 0, sizeof(float) * (ld - n));
    }
    std::memset(to + at.count * ld, 0, sizeof(float) * (C - at.count) * ld);
  }
  void pack_features(const Rows& rows, const Chunk& at, float factor, float* to, float* inverse) const {
    pack(rows, h / x.sharing, at, x.K, to, Kw);
    for (int64_t i = 0; i < at.count; ++i) {
      float* row = to + i * Kw;
      inverse[i] = x.normalize ? 1 / std::sqrt(dot(row, row, Kw) + NORM_EPS) : 1;
      if (inverse[i] * factor != 1) scaled(row, inverse[i] * factor, row, Kw);
    }
  }

  void prepare(Chunk& at, int64_t n, bool with_queries) {
    at.first = n * C, at.count = std::min<int64_t>(C, x.L - at.first);
    if (with_queries) pack_features(x.q, at, x.scale, at.q, at.inverse_q);
    pack_features(x.k, at, 1, at.k, at.inverse_k);
    pack(x.v, h, at, x.V, at.v, Vw);
    double G[C];
    int32_t document[C];
    double sum = 0;
    int32_t id = 0;
    for (int64_t i = 0; i < C; ++i) {
      const int64_t index = (b * x.L + at.first + i) * x.H + h;
      at.beta[i] = i < at.count ? x.beta[index] : 0;
      if (i < at.count && x.log_decay) sum += vmax_float(x.log_decay[index], LEAST_LOG_DECAY);
      if (i < at.count && x.starts) id += x.starts[b * x.L + at.first + i];
      G[i] = sum, document[i] = id;
    }
    at.passing = id ? 0 : std::exp(sum);
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

  // T = (I + beta M)^-1, row by row. Equal keys make terms of alternating signs: each of two sums, which run at the same
  // time, takes pairs of neighbours, so that it stays small.
  static void invert(Chunk& at) {
    constexpr int N = C / W;
    for (int64_t i = 0; i < C; ++i) {
      vec sums[2][N] = {};
      for (int64_t j = 0; j < i; j += 4)
#pragma GCC unroll 4
        for (int64_t d = 0; d < 4; ++d) {
          if (j + d >= i) break;
          const vec left = splat(at.M[i * C + j + d]);
#pragma GCC unroll 16
          for (int n = 0; n < N; ++n) sums[d / 2][n] += left * load(at.T + (j + d) * C + n * W);
        }
      for (int n = 0; n < N; ++n) store(at.T + i * C + n * W, (sums[0][n] + sums[1][n]) * -at.beta[i]);
      at.T[i * C + i] = 1;
    }
  }

  // R = U - W S
  void read_state(Chunk& at) const {
    product(plain(at.Wk, Kw), state, Sw, C, Sw, x.K, FULL, [&](int64_t r, int64_t c, vec sum) {
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
    sum = sum * passing + __builtin_convertvector(x, dvec);
    std::memcpy(p, &sum, sizeof sum);
  }

  void outputs(const Chunk& at) {
    product(plain(at.EQ, Kw), state, Sw, C, Vw, x.K, FULL,
            [&](int64_t r, int64_t c, vec sum) { store(g + r * Vw + c, sum); });
    product(plain(at.P, C), at.R, Sw, C, Vw, C, LOWER,
            [&](int64_t r, int64_t c, vec sum) { store(g + r * Vw + c, load(g + r * Vw + c) + sum); });
    unpack(at, g, Vw, x.V, x.y);
  }
  void unpack(const Chunk& at, const float* from, int64_t ld, int64_t n, float* to) const {
    for (int64_t i = 0; i < at.count; ++i)
      std::memcpy(to + ((b * x.L + at.first + i) * x.H + h) * n, from + i * ld, sizeof(float) * n);
  }

  // Moves the gradient of the state before the chunk; the gradients of its inputs, where they are asked for.
  void adjoint(Chunk& at) {
    for (int64_t i = 0; i < Kw * Vw; i += W) store(dS + i, narrow(gradient + i));
    pack(x.grad, h, at, x.V, g, Vw);
    product(transposed(at.P, C), g, Vw, C, Vw, C, UPPER,
            [&](int64_t r, int64_t c, vec sum) { store(dR + r * Vw + c, sum); });
    product(plain(at.FK, Kw), dS, Vw, C, Vw, x.K, FULL,
            [&](int64_t r, int64_t c, vec sum) { store(dR + r * Vw + c, load(dR + r * Vw + c) + sum); });
    product(transposed(at.T, C), dR, Vw, C, Vw, C, UPPER,
            [&](int64_t r, int64_t c, vec sum) { store(Z + r * Vw + c, sum); });
    double at_end = 0;
    if (x.dlog_decay)
      for (int64_t i = 0; i < x.K; ++i) at_end += dot(at.S + i * Sw, dS + i * Vw, Vw);
    at_end *= at.passing;
    product(transposed(at.EQ, Kw), g, Vw, Kw, Vw, C, FULL,
            [&](int64_t r, int64_t c, vec sum) { pass_on(gradient + r * Vw + c, at.passing, sum); });
    product(transposed(at.bEK, Kw), Z, Vw, Kw, Vw, C, FULL,
            [&](int64_t r, int64_t c, vec sum) { pass_on(gradient + r * Vw + c, 1, -sum); });
    if (!x.dq) return;

    transpose(at.R, Sw, C, Vw, transposed_R, C);
    transpose(at.S, Sw, Kw, Vw, transposed_S, Kw);
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
    });
    product(plain(Z, Vw), transposed_S, Kw, C, Kw, x.V, FULL, write(read, Kw));
    float dbeta[C];
    for (int64_t i = 0; i < C; ++i) {
      const int64_t seen = up(i + 1, W);
      for (int64_t j = i; j < seen; ++j) pairs[i * C + j] = 0;
      dbeta[i] = dot(Z + i * Vw, at.v + i * Vw, Vw) - at.E[i] * dot(read + i * Kw, at.k + i * Kw, Kw) -
                 dot(pairs + i * C, at.M + i * C, seen);
      for (int64_t j = 0; j < seen; j += W)
        store(pairs + i * C + j, load(pairs + i * C + j) * load(at.D + i * C + j) * -at.beta[i]);
    }
    product(plain(pairs, C), at.k, Kw, C, Kw, C, LOWER, write(key_rows, Kw));
    for (int64_t i = 0; i < C; ++i) add_scaled(read + i * Kw, -at.beta[i] * at.E[i], key_rows + i * Kw, Kw);
    product(plain(at.R, Sw), transposed_dS, Kw, C, Kw, x.V, FULL, write(key_columns, Kw));
    for (int64_t i = 0; i < C; ++i) {
      scaled(key_columns + i * Kw, at.F[i], key_columns + i * Kw, Kw);
      at_end += dot(key_columns + i * Kw, at.k + i * Kw, Kw);
    }
    product(transposed(pairs, C), at.k, Kw, C, Kw, C, UPPER, add(key_columns, Kw));
    product(transposed(query_pairs, C), at.q, Kw, C, Kw, C, UPPER, add(key_columns, Kw));
    product(plain(g, Vw), transposed_S, Kw, C, Kw, x.V, FULL, [&](int64_t r, int64_t c, vec sum) {
      store(queries + r * Kw + c, sum * at.E[r]);
    });
    product(plain(query_pairs, C), at.k, Kw, C, Kw, C, LOWER, add(queries, Kw));

    double passed = at_end;
    for (int64_t i = at.count; i-- > 0;) {
      const int64_t index = (b * x.L + at.first + i) * x.H + h;
      float *dq = queries + i * Kw, *rows = key_rows + i * Kw, *columns = key_columns + i * Kw;
      const float *q = at.q + i * Kw, *k = at.k + i * Kw;
      const double along_q = dot(dq, q, Kw), along_rows = dot(rows, k, Kw), along_columns = dot(columns, k, Kw);
      passed += along_q + along_rows - along_columns;
      if (x.dlog_decay) x.dlog_decay[index] = float(passed);
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

  const Call& x;
  const int64_t Kw, Vw, Sw, kept;
  Memory memory;
  std::vector<Chunk> chunks;
  float *state, *transposed_k, *g, *dR, *Z, *transposed_R, *transposed_S, *transposed_dS, *pairs, *query_pairs, *queries,
      *key_rows, *key_columns, *read;
  float* dS;                // gradient of the state behind the chunk, of `gradient`
  double *wide, *gradient;  // the state, which `state` rounds; the gradient of the state
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
