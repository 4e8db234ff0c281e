// Modal long convolution on CPUs: the recurrence s_i = lambda s_(i-1) + x_i itself, in fp64, a few channels at a time.
//
// In fp64, because lambda^m of a slow mode needs more digits than fp32 has; then the recurrence is exact enough over any
// length. Groups of modes, with states and factors in registers, run over chunks of tokens in the first-level cache.
// Backward runs over the chunks from right to left with t_i = conj(c) g_i + conj(lambda) t_(i+1); the states of a chunk are
// recomputed from those saved every SAVED tokens. README.md has the formulas.
#include "native.h"

namespace {

constexpr int LANES = W / 2;                   // channels at a time
constexpr int GROUP = 4;                       // modes in registers
constexpr int CHUNK = 32;                      // tokens whose states are held at once backward
constexpr int SAVED = 256;                     // tokens between the states that forward saves; a multiple of CHUNK

typedef double num __attribute__((vector_size(8 * LANES)));
typedef float fvec __attribute__((vector_size(4 * LANES)));
typedef uint32_t ufvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hfvec __attribute__((vector_size(2 * LANES)));

static inline num wide(const float* p) {
  fvec x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, num);
}
static inline num wide(const bf16* p) {
  hfvec x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector((fvec)(__builtin_convertvector(x, ufvec) << 16), num);
}
static inline num wide(const double* p) {
  num x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline void put(double* p, num x) { std::memcpy(p, &x, sizeof x); }
static inline void put(float* p, num x) {
  fvec y = __builtin_convertvector(x, fvec);
  std::memcpy(p, &y, sizeof y);
}
static inline void put(bf16* p, num x) {
  ufvec bits = (ufvec)__builtin_convertvector(x, fvec);
  hfvec h = __builtin_convertvector((bits + (0x7fff + ((bits >> 16) & 1))) >> 16, hfvec);
  std::memcpy(p, &h, sizeof h);
}

// The real and imaginary parts of a group's modes.
struct Modes {
  num re[GROUP], im[GROUP];

  // From and to fp64 [2, N, D], at the group's first mode and some channels.
  static Modes load(const double* p, int64_t N, int64_t D) {
    Modes m;
#pragma GCC unroll 8
    for (int n = 0; n < GROUP; ++n) m.re[n] = wide(p + n * D), m.im[n] = wide(p + (N + n) * D);
    return m;
  }
  void store(double* p, int64_t N, int64_t D) const {
#pragma GCC unroll 8
    for (int n = 0; n < GROUP; ++n) put(p + n * D, re[n]), put(p + (N + n) * D, im[n]);
  }
  void clear() {
#pragma GCC unroll 8
    for (int n = 0; n < GROUP; ++n) re[n] = num{}, im[n] = num{};
  }
  // lambda s + x.
  void step(const Modes& lambda, num x) {
#pragma GCC unroll 8
    for (int n = 0; n < GROUP; ++n) {
      num r = lambda.re[n] * re[n] - lambda.im[n] * im[n] + x;
      im[n] = lambda.re[n] * im[n] + lambda.im[n] * re[n];
      re[n] = r;
    }
  }
  // conj(lambda) t.
  void step_back(const Modes& lambda) {
#pragma GCC unroll 8
    for (int n = 0; n < GROUP; ++n) {
      num r = lambda.re[n] * re[n] + lambda.im[n] * im[n];
      im[n] = lambda.re[n] * im[n] - lambda.im[n] * re[n];
      re[n] = r;
    }
  }
};

template <class X>
struct Call {
  int64_t B, L, D, N;  // D a multiple of LANES, N of GROUP
  const X *x, *grad;
  int64_t x_row, x_token, grad_row, grad_token;
  X *y, *dx;                                           // [B, L, D]
  const double *lambda, *c;                            // [2, N, D]
  const uint8_t* document_starts;                      // [B, L], or null
  const double *initial, *final_grad;                  // [B, 2, N, D]; null for zeros
  double *final, *saved, *dlambda, *dc;                // final as initial; saved [B, S, 2, N, D]; the others as initial

  bool starts_document(int64_t b, int64_t i) const { return document_starts && document_starts[b * L + i]; }
  int64_t num_saved() const { return (L + SAVED - 1) / SAVED; }
};

static inline Modes load_or_zero(const double* p, int64_t offset, int64_t N, int64_t D) {
  if (p) return Modes::load(p + offset, N, D);
  Modes m;
  m.clear();
  return m;
}

// LANES channels of one row.
template <class X>
void forward(const Call<X>& a, int64_t b, int64_t c) {
  const int64_t size = 2 * a.N * a.D;
  std::vector<Modes> states(a.N / GROUP);
  for (int64_t n = 0; n < a.N; n += GROUP)
    states[n / GROUP] = load_or_zero(a.initial, b * size + n * a.D + c, a.N, a.D);
  for (int64_t first = 0; first < a.L; first += CHUNK) {
    const int count = int(std::min<int64_t>(CHUNK, a.L - first));
    num x[CHUNK], y[CHUNK] = {};
    for (int i = 0; i < count; ++i) x[i] = wide(a.x + b * a.x_row + (first + i) * a.x_token + c);
    for (int64_t n = 0; n < a.N; n += GROUP) {
      const Modes lambda = Modes::load(a.lambda + n * a.D + c, a.N, a.D), amplitude = Modes::load(a.c + n * a.D + c, a.N, a.D);
      Modes s = states[n / GROUP];
      if (a.saved && first % SAVED == 0)
        s.store(a.saved + (b * a.num_saved() + first / SAVED) * size + n * a.D + c, a.N, a.D);
      for (int i = 0; i < count; ++i) {
        if (a.starts_document(b, first + i)) s.clear();
        s.step(lambda, x[i]);
#pragma GCC unroll 8
        for (int m = 0; m < GROUP; ++m) y[i] += amplitude.re[m] * s.re[m] - amplitude.im[m] * s.im[m];
      }
      states[n / GROUP] = s;
    }
    if (a.y)
      for (int i = 0; i < count; ++i) put(a.y + (b * a.L + first + i) * a.D + c, y[i]);
  }
  if (a.final)
    for (int64_t n = 0; n < a.N; n += GROUP) states[n / GROUP].store(a.final + b * size + n * a.D + c, a.N, a.D);
}

// Writes the gradient of the initial state to `final`, and dx and the gradients of the parameters unless dx is null.
template <class X>
void backward(const Call<X>& a, int64_t b, int64_t c) {
  const int64_t size = 2 * a.N * a.D, groups = a.N / GROUP;
  std::vector<Modes> ahead(groups), to_lambda(groups), to_c(groups), starts(groups * (SAVED / CHUNK));
  for (int64_t g = 0; g < groups; ++g) {
    ahead[g] = load_or_zero(a.final_grad, b * size + g * GROUP * a.D + c, a.N, a.D);
    to_lambda[g].clear(), to_c[g].clear();
  }
  for (int64_t section = a.num_saved() - 1; section >= 0; --section) {
    const int64_t begin = section * SAVED, end = std::min(a.L, begin + SAVED);
    const int64_t chunks = (end - begin + CHUNK - 1) / CHUNK;
    if (a.dx)
      for (int64_t g = 0; g < groups; ++g) {
        const Modes lambda = Modes::load(a.lambda + g * GROUP * a.D + c, a.N, a.D);
        Modes s = Modes::load(a.saved + (b * a.num_saved() + section) * size + g * GROUP * a.D + c, a.N, a.D);
        for (int64_t i = begin; i < end; ++i) {
          if ((i - begin) % CHUNK == 0) starts[(i - begin) / CHUNK * groups + g] = s;
          if (a.starts_document(b, i)) s.clear();
          s.step(lambda, wide(a.x + b * a.x_row + i * a.x_token + c));
        }
      }
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t first = begin + chunk * CHUNK;
      const int count = int(std::min<int64_t>(CHUNK, end - first));
      num x[CHUNK], grad[CHUNK], dx[CHUNK] = {};
      for (int i = 0; i < count; ++i) grad[i] = wide(a.grad + b * a.grad_row + (first + i) * a.grad_token + c);
      if (a.dx)
        for (int i = 0; i < count; ++i) x[i] = wide(a.x + b * a.x_row + (first + i) * a.x_token + c);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t n = g * GROUP;
        const Modes lambda = Modes::load(a.lambda + n * a.D + c, a.N, a.D), amplitude = Modes::load(a.c + n * a.D + c, a.N, a.D);
        Modes before[CHUNK], t = ahead[g], dlambda = to_lambda[g], dc = to_c[g];  // the states before each token
        if (a.dx) {
          Modes s = starts[chunk * groups + g];
          for (int i = 0; i < count; ++i) {
            if (a.starts_document(b, first + i)) s.clear();
            before[i] = s;
            s.step(lambda, x[i]);
          }
        }
        for (int i = count - 1; i >= 0; --i) {
          // Here t is the gradient of this token's state through the later tokens.
          if (first + i + 1 < a.L && a.starts_document(b, first + i + 1)) t.clear();
#pragma GCC unroll 8
          for (int m = 0; m < GROUP; ++m) {
            t.re[m] += amplitude.re[m] * grad[i];
            t.im[m] -= amplitude.im[m] * grad[i];
          }
          if (a.dx) {
            const Modes& s = before[i];
#pragma GCC unroll 8
            for (int m = 0; m < GROUP; ++m) {
              dx[i] += t.re[m];
              dlambda.re[m] += s.re[m] * t.re[m] + s.im[m] * t.im[m];
              dlambda.im[m] += s.re[m] * t.im[m] - s.im[m] * t.re[m];
              // The state of this token, conjugated.
              dc.re[m] += grad[i] * (lambda.re[m] * s.re[m] - lambda.im[m] * s.im[m] + x[i]);
              dc.im[m] -= grad[i] * (lambda.re[m] * s.im[m] + lambda.im[m] * s.re[m]);
            }
          }
          t.step_back(lambda);
        }
        ahead[g] = t, to_lambda[g] = dlambda, to_c[g] = dc;
      }
      if (a.dx)
        for (int i = 0; i < count; ++i) put(a.dx + (b * a.L + first + i) * a.D + c, dx[i]);
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t place = b * size + g * GROUP * a.D + c;
    if (a.final) ahead[g].store(a.final + place, a.N, a.D);
    if (a.dx) to_lambda[g].store(a.dlambda + place, a.N, a.D), to_c[g].store(a.dc + place, a.N, a.D);
  }
}

template <class X>
void run(const int64_t* n, const void* const* p) {
  Call<X> a{n[0], n[1], n[2], n[3], (const X*)p[0], (const X*)p[1], n[4], n[5], n[6], n[7], (X*)p[2], (X*)p[3],
            (const double*)p[4], (const double*)p[5], (const uint8_t*)p[6], (const double*)p[7], (const double*)p[8],
            (double*)p[9], (double*)p[10], (double*)p[11], (double*)p[12]};
  const int64_t stripes = a.D / LANES;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < a.B * stripes; ++task) {
    const int64_t b = task / stripes, c = task % stripes * LANES;
    if (a.grad)
      backward(a, b, c);
    else
      forward(a, b, c);
  }
}

}  // namespace

// n: B L D N, strides over rows and tokens of x and of grad. p: x grad y dx lambda c document_starts initial final_grad
// final saved dlambda dc; grad is null forward. Backward, final receives the gradient of the initial state.
extern "C" void modal_conv(int is_bf16, const int64_t* n, const void* const* p) {
  if (is_bf16)
    run<bf16>(n, p);
  else
    run<float>(n, p);
}
