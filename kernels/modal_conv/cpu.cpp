// Modal long convolution on CPUs: the recurrence s_i = lambda s_(i-1) + x_i itself, in fp64, a few channels at a time.
//
// fp64, because lambda^m of a slow mode needs more digits than fp32 has, and because it lets the recurrence run over any
// length as it is written. Modes go in groups whose states and factors stay in registers, over blocks of tokens that stay
// in the first-level cache. Backward walks the blocks from the right with t_i = conj(c) g_i + conj(lambda) t_(i+1); the
// states of a block are made again from those saved every SAVED tokens. README.md has the formulas.
#include "native.h"

namespace {

constexpr int LANES = W / 2;                   // channels at a time
constexpr int GROUP = 4;                       // modes in registers
constexpr int BLOCK = 32;                      // tokens whose states are kept while walking back
constexpr int SAVED = 256;                     // tokens between the states that forward saves; a multiple of BLOCK

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
  const uint8_t* begins;                               // [B, L], or null
  const double *past, *future;                         // [B, 2, N, D]; null for zeros
  double *end, *saved, *dlambda, *dc;                  // end as past; saved [B, S, 2, N, D]; the others as past

  bool begin(int64_t b, int64_t i) const { return begins && begins[b * L + i]; }
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
  for (int64_t n = 0; n < a.N; n += GROUP) states[n / GROUP] = load_or_zero(a.past, b * size + n * a.D + c, a.N, a.D);
  for (int64_t first = 0; first < a.L; first += BLOCK) {
    const int count = int(std::min<int64_t>(BLOCK, a.L - first));
    num x[BLOCK], y[BLOCK] = {};
    for (int i = 0; i < count; ++i) x[i] = wide(a.x + b * a.x_row + (first + i) * a.x_token + c);
    for (int64_t n = 0; n < a.N; n += GROUP) {
      const Modes lambda = Modes::load(a.lambda + n * a.D + c, a.N, a.D), amplitude = Modes::load(a.c + n * a.D + c, a.N, a.D);
      Modes s = states[n / GROUP];
      if (a.saved && first % SAVED == 0)
        s.store(a.saved + (b * a.num_saved() + first / SAVED) * size + n * a.D + c, a.N, a.D);
      for (int i = 0; i < count; ++i) {
        if (a.begin(b, first + i)) s.clear();
        s.step(lambda, x[i]);
#pragma GCC unroll 8
        for (int m = 0; m < GROUP; ++m) y[i] += amplitude.re[m] * s.re[m] - amplitude.im[m] * s.im[m];
      }
      states[n / GROUP] = s;
    }
    if (a.y)
      for (int i = 0; i < count; ++i) put(a.y + (b * a.L + first + i) * a.D + c, y[i]);
  }
  if (a.end)
    for (int64_t n = 0; n < a.N; n += GROUP) states[n / GROUP].store(a.end + b * size + n * a.D + c, a.N, a.D);
}

// Writes what `past` receives to `end`; dx and the parameters' gradients unless dx is null.
template <class X>
void backward(const Call<X>& a, int64_t b, int64_t c) {
  const int64_t size = 2 * a.N * a.D, groups = a.N / GROUP;
  std::vector<Modes> ahead(groups), to_lambda(groups), to_c(groups), starts(groups * (SAVED / BLOCK));
  for (int64_t g = 0; g < groups; ++g) {
    ahead[g] = load_or_zero(a.future, b * size + g * GROUP * a.D + c, a.N, a.D);
    to_lambda[g].clear(), to_c[g].clear();
  }
  for (int64_t super = a.num_saved() - 1; super >= 0; --super) {
    const int64_t begin = super * SAVED, end = std::min(a.L, begin + SAVED), blocks = (end - begin + BLOCK - 1) / BLOCK;
    if (a.dx)
      for (int64_t g = 0; g < groups; ++g) {
        const Modes lambda = Modes::load(a.lambda + g * GROUP * a.D + c, a.N, a.D);
        Modes s = Modes::load(a.saved + (b * a.num_saved() + super) * size + g * GROUP * a.D + c, a.N, a.D);
        for (int64_t i = begin; i < end; ++i) {
          if ((i - begin) % BLOCK == 0) starts[(i - begin) / BLOCK * groups + g] = s;
          if (a.begin(b, i)) s.clear();
          s.step(lambda, wide(a.x + b * a.x_row + i * a.x_token + c));
        }
      }
    for (int64_t block = blocks - 1; block >= 0; --block) {
      const int64_t first = begin + block * BLOCK;
      const int count = int(std::min<int64_t>(BLOCK, end - first));
      num x[BLOCK], grad[BLOCK], dx[BLOCK] = {};
      for (int i = 0; i < count; ++i) grad[i] = wide(a.grad + b * a.grad_row + (first + i) * a.grad_token + c);
      if (a.dx)
        for (int i = 0; i < count; ++i) x[i] = wide(a.x + b * a.x_row + (first + i) * a.x_token + c);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t n = g * GROUP;
        const Modes lambda = Modes::load(a.lambda + n * a.D + c, a.N, a.D), amplitude = Modes::load(a.c + n * a.D + c, a.N, a.D);
        Modes before[BLOCK], t = ahead[g], dlambda = to_lambda[g], dc = to_c[g];  // the states before each token
        if (a.dx) {
          Modes s = starts[block * groups + g];
          for (int i = 0; i < count; ++i) {
            if (a.begin(b, first + i)) s.clear();
            before[i] = s;
            s.step(lambda, x[i]);
          }
        }
        for (int i = count - 1; i >= 0; --i) {
          // t holds what the state behind this token receives.
          if (first + i + 1 < a.L && a.begin(b, first + i + 1)) t.clear();
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
    if (a.end) ahead[g].store(a.end + place, a.N, a.D);
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

// n: B L D N, strides over rows and tokens of x and of grad. p: x grad y dx lambda c begins past future end saved dlambda
// dc; grad is null forward.
extern "C" void modal_conv(int is_bf16, const int64_t* n, const void* const* p) {
  if (is_bf16)
    run<bf16>(n, p);
  else
    run<float>(n, p);
}
