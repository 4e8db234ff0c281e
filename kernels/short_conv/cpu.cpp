// Short convolution on CPUs: token by token, all channels of a row at once, so that every tensor is read and written once.
//
// Backward works on some tokens at a time: the gradient before the activation stays in the second-level cache until dx and
// the gradients of the taps are computed from it. Those of the taps are summed over ranges of tokens here, and over the
// ranges by the caller, in an order that does not depend on the number of threads. Tokens of another document, or beyond
// the ends, are a row of zeros.
#include <cmath>

#include "native.h"

namespace {

constexpr int64_t SCRATCH = 1 << 15;  // floats of the gradients of some tokens, at most 64: sums in fp32

static inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
static inline vec sigmoid(vec x) { return 1.0f / (1.0f + vexp(-x)); }

template <class X>
struct Call {
  int64_t B, L, D, T, taps, left, silu;
  const X *x, *past, *grad;
  int64_t x_row, x_token, grad_row, grad_token;
  const float *weight, *bias;             // [taps, D], [D] or null
  const int64_t *segments, *past_ids;     // [B, L], [B, T], or null
  X *y, *dx, *dpast;                      // [B, L, D], [B, L, D], [B, T, D]
  double* partial;                        // [B, num_sums, taps + 1, D]
  const X* zeros;                         // [D]

  int64_t id(int64_t b, int64_t i) const { return i < 0 ? past_ids[b * T + T + i] : segments[b * L + i]; }
  bool together(int64_t b, int64_t i, int64_t j) const { return !segments || id(b, i) == id(b, j); }
  const X* token(int64_t b, int64_t i) const {
    return i < 0 ? past + (b * T + T + i) * D : x + b * x_row + i * x_token;
  }
  // The token under a tap of token i.
  const X* seen(int64_t b, int64_t i, int64_t tap) const {
    int64_t j = i + tap - left;
    return j >= -T && j < L && together(b, i, j) ? token(b, j) : zeros;
  }
};

template <int N, class X, class V>
static inline V convolve(const Call<X>& a, const X* const* rows, int64_t c) {
  V z = a.bias ? get<V>(a.bias + c) : V{};
  const int64_t n = N ? N : a.taps;
#pragma GCC unroll 8
  for (int64_t tap = 0; tap < n; ++tap) z += get<V>(a.weight + tap * a.D + c) * get<V>(rows[tap] + c);
  return z;
}

// For all channels: by whole vectors, then one by one.
template <class F>
static inline void channels(int64_t D, F body) {
  int64_t c = 0;
  for (; c + W <= D; c += W) body(vec{}, c);
  for (; c < D; ++c) body(float{}, c);
}

template <int N, class X>
void forward(const Call<X>& a, int64_t b, int64_t first, int64_t last) {
  std::vector<const X*> rows(a.taps);
  for (int64_t i = first; i < last; ++i) {
    for (int64_t tap = 0; tap < a.taps; ++tap) rows[tap] = a.seen(b, i, tap);
    X* y = a.y + (b * a.L + i) * a.D;
    const X* const* seen = rows.data();
    channels(a.D, [&](auto lane, int64_t c) {
      using V = decltype(lane);
      V z = convolve<N, X, V>(a, seen, c);
      put(y + c, a.silu ? z * sigmoid(z) : z);
    });
  }
}

// The gradients of the tokens [first, last), of the past where negative, and their contribution to those of taps and bias.
template <int N, class X>
void backward(const Call<X>& a, int64_t b, int64_t first, int64_t last, double* partial, float* scratch, float* sums) {
  const int64_t right = a.taps - 1 - a.left, D = a.D;
  std::vector<const X*> rows(a.taps);
  std::fill_n(sums, (a.taps + 1) * D, 0.0f);
  // Tokens that see one of these: before the activation, in scratch.
  const int64_t begin = std::max<int64_t>(0, first - right), end = std::min(a.L, last + a.left);
  for (int64_t i = begin; i < end; ++i) {
    float* g = scratch + (i - begin) * D;
    const X* grad = a.grad + b * a.grad_row + i * a.grad_token;
    const bool own = i >= first && i < last;
    for (int64_t tap = 0; tap < a.taps; ++tap) rows[tap] = a.seen(b, i, tap);
    const X* const* seen = rows.data();
    channels(D, [&](auto lane, int64_t c) {
      using V = decltype(lane);
      V here = get<V>(grad + c);
      if (a.silu) {
        V z = convolve<N, X, V>(a, seen, c), s = sigmoid(z);
        here *= s * (1.0f + z * (1.0f - s));
      }
      put(g + c, here);
      if (own) {
        const int64_t n = N ? N : a.taps;
#pragma GCC unroll 8
        for (int64_t tap = 0; tap < n; ++tap)
          put(sums + tap * D + c, get<V>(sums + tap * D + c) + here * get<V>(seen[tap] + c));
        put(sums + a.taps * D + c, get<V>(sums + a.taps * D + c) + here);
      }
    });
  }
  if (partial)
    for (int64_t n = 0; n < (a.taps + 1) * D; ++n) partial[n] += sums[n];
  std::vector<const float*> from(a.taps), weights(a.taps);
  for (int64_t j = first; j < last; ++j) {
    int64_t count = 0;
    for (int64_t tap = 0; tap < a.taps; ++tap) {
      int64_t i = j - tap + a.left;
      if (i >= begin && i < end && a.together(b, i, j))
        from[count] = scratch + (i - begin) * D, weights[count++] = a.weight + tap * D;
    }
    X* dx = j < 0 ? a.dpast + (b * a.T + a.T + j) * D : a.dx + (b * a.L + j) * D;
    channels(D, [&](auto lane, int64_t c) {
      using V = decltype(lane);
      V sum{};
      for (int64_t n = 0; n < count; ++n) sum += get<V>(weights[n] + c) * get<V>(from[n] + c);
      put(dx + c, sum);
    });
  }
}

template <int N, class X>
void run(const Call<X>& a, int64_t sum_len, int64_t num_sums) {
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < a.B * num_sums; ++task) {
    const int64_t b = task / num_sums, first = task % num_sums * sum_len, last = std::min(a.L, first + sum_len);
    if (a.y) {
      forward<N>(a, b, first, last);
      continue;
    }
    const int64_t step = std::clamp<int64_t>(SCRATCH / std::max<int64_t>(a.D, 1), 8, 64);
    std::vector<float> scratch((std::max(step, a.T) + a.taps) * a.D), sums((a.taps + 1) * a.D);
    double* partial = a.partial + task * (a.taps + 1) * a.D;
    if (first == 0 && a.T) backward<N>(a, b, -a.T, 0, nullptr, scratch.data(), sums.data());
    for (int64_t start = first; start < last; start += step)
      backward<N>(a, b, start, std::min(last, start + step), partial, scratch.data(), sums.data());
  }
}

template <class X>
void run(const int64_t* n, const void* const* p) {
  const std::vector<X> zeros(n[2]);
  Call<X> a{n[0], n[1], n[2], n[3], n[4], n[5], n[6], (const X*)p[0], (const X*)p[1], (const X*)p[2], n[7], n[8], n[9],
            n[10], (const float*)p[3], (const float*)p[4], (const int64_t*)p[5], (const int64_t*)p[6], (X*)p[7], (X*)p[8],
            (X*)p[9], (double*)p[10], zeros.data()};
  switch (a.taps) {
    case 3: return run<3>(a, n[11], n[12]);
    case 4: return run<4>(a, n[11], n[12]);
    default: return run<0>(a, n[11], n[12]);
  }
}

}  // namespace

// n: B L D T taps left silu, strides over rows and tokens of x and of grad, sum_len, num_sums.
// p: x past grad weight bias segments past_ids, y (forward) or null and dx dpast partial (backward, zeroed).
extern "C" void short_conv(int is_bf16, const int64_t* n, const void* const* p) {
  if (is_bf16)
    run<bf16>(n, p);
  else
    run<float>(n, p);
}
