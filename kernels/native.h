// Shared by the C++ kernels: vectors of floats of this processor's width, their loads and stores, and the division of work
// among threads. Uses the vector extensions of GCC and Clang, so that one source serves every processor.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;  // SSE, NEON
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

static inline vec splat(float x) { return x - vec{}; }
// NaN in a is kept.
static inline vec vmin(vec a, vec b) { return a > b ? b : a; }
static inline vec vmax(vec a, vec b) { return a < b ? b : a; }
static inline vec clamp(vec x, float limit) { return vmin(vmax(x, splat(-limit)), splat(limit)); }
static inline vec vabs(vec x) { return (vec)((ivec)x & 0x7fffffff); }

static inline vec load(const float* p) {
  vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline vec load(const bf16* p) {
  hvec x;
  std::memcpy(&x, p, sizeof x);
  return (vec)(__builtin_convertvector(x, uvec) << 16);
}
static inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }
// Rounds to nearest even; NaN stays NaN.
static inline void store(bf16* p, vec x) {
  uvec bits = x != x ? (uvec)splat(__builtin_nanf("")) : (uvec)x;
  hvec h = __builtin_convertvector((bits + (0x7fff + ((bits >> 16) & 1))) >> 16, hvec);
  std::memcpy(p, &h, sizeof h);
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // The mantissa's rounding must not turn NaN into a number.
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + (0x7fff + ((bits >> 16) & 1))) >> 16);
}
template <class X>
static inline void put(X* p, vec x) {
  store(p, x);
}
// A vector of channels, or a single channel.
template <class V, class X>
static inline V get(const X* p) {
  if constexpr (std::is_same_v<V, vec>)
    return load(p);
  else
    return to_float(*p);
}

typedef double dvec __attribute__((vector_size(8 * W)));
static inline vec narrow(const double* p) {
  dvec x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vec);
}
static inline void add_wide(double* p, vec x) {
  dvec sum;
  std::memcpy(&sum, p, sizeof sum);
  sum += __builtin_convertvector(x, dvec);
  std::memcpy(p, &sum, sizeof sum);
}

template <class X>
constexpr float largest();
template <>
constexpr float largest<float>() {
  return 3.4028234663852886e38f;
}
template <>
constexpr float largest<bf16>() {
  return 3.3895313892515355e38f;
}

// Stores x, clamped to the finite range of X.
template <class X>
static inline void store_finite(X* p, vec x) {
  store(p, clamp(x, largest<X>()));
}

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2, by its series to r^7; relative error below 1e-7.
static inline vec vexp(vec x) {
  vec y = clamp(x, 88.0f);
  vec n = (y * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  vec r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vec scale = (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
  return x < -87.0f ? splat(0.0f) : p * scale;
}

// Consecutive vectors of channels of one row of the batch: the work of one thread.
struct Task {
  int64_t row, first, last;  // channels [first, last)
};

// B rows of D channels, a multiple of W, divided among this process's threads.
static inline std::vector<Task> tasks(int64_t B, int64_t D) {
  int64_t vectors = D / W;
  int64_t cuts = std::min(vectors, std::max<int64_t>(1, (omp_get_max_threads() + B - 1) / std::max<int64_t>(B, 1)));
  std::vector<Task> all;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < cuts; ++c)
      all.push_back({b, vectors * c / cuts * W, vectors * (c + 1) / cuts * W});
  return all;
}
