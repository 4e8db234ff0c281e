// Matrix products of the C++ kernels: tiles of sums in registers, and transposition.
#pragma once
#include "native.h"

#include <utility>

constexpr int TILE = W == 16 ? 8 : 4;  // rows of a tile: with 3 vectors a row, sums and operands fill the registers

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// TILE rows of N vectors of a matrix product.
template <int N>
struct Tile {
  vec sum[TILE][N];

  Tile() {
    each([](vec& x, int, int) { x = vec{}; });
  }
  template <class F>
  __attribute__((always_inline)) void each(F f) {
#pragma GCC unroll 16
    for (int r = 0; r < TILE; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) f(sum[r][n], r, n);
  }
  // Adds sum_j a[r row + j step] b[j ld + n W], j < count.
  __attribute__((always_inline)) void add(const float* a, int64_t row, int64_t step, const float* b, int64_t ld,
                                          int64_t count) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < count; ++j, a += step, b += ld) {
      vec right[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) right[n] = load(b + n * W);
#pragma GCC unroll 16
      for (int r = 0; r < TILE; ++r) {
        vec left = splat(a[r * row]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[r][n] += left * right[n];
      }
    }
  }
};

// Calls f(first, N) for tiles of N vectors that cover all; a tile of one vector has the latency of its own sums.
template <class F>
__attribute__((always_inline)) inline void tiles(int64_t vectors, F f) {
  for (int64_t first = 0; first < vectors;) {
    const int64_t left = vectors - first;
    if (left == 1)
      f(first, std::integral_constant<int, 1>()), first += 1;
    else if (left == 2 || left == 4)
      f(first, std::integral_constant<int, 2>()), first += 2;
    else
      f(first, std::integral_constant<int, 3>()), first += 3;
  }
}

// Which elements of a product count: with A lower (or upper) triangular, sums are as short; of a lower triangular result,
// the tiles above the diagonal are left out.
enum Shape { FULL, LOWER, UPPER, LOWER_RESULT };

// A matrix whose element (r, j) is at data[r row + j step].
struct Factor {
  const float* data;
  int64_t row, step;
};
inline Factor plain(const float* data, int64_t ld) { return {data, ld, 1}; }
inline Factor transposed(const float* data, int64_t ld) { return {data, 1, ld}; }

// a [rows, count] times b [count, columns], of rows of ld floats; rows are whole tiles and columns whole vectors. Calls
// put(r, c, sum) with each vector of the result.
template <class Put>
__attribute__((always_inline)) inline void product(Factor a, const float* b, int64_t ld, int64_t rows, int64_t columns,
                                                   int64_t count, Shape shape, Put put) {
  for (int64_t r = 0; r < rows; r += TILE) {
    const int64_t first = shape == UPPER ? r : 0, stop = shape == LOWER ? std::min(count, r + TILE) : count;
    const int64_t vectors = shape == LOWER_RESULT ? std::min(columns, r + TILE + W - 1) / W : columns / W;
    auto tile = [&](int64_t c, auto n) __attribute__((always_inline)) {
      Tile<n> sums;
      sums.add(a.data + r * a.row + first * a.step, a.row, a.step, b + first * ld + c * W, ld, stop - first);
      sums.each([&](vec& x, int i, int j) { put(r + i, (c + j) * W, x); });
    };
    tiles(vectors, tile);
  }
}

// A row of a 2 x 2 transposition of squares of S lanes: the lower squares of a and b, or the higher ones.
template <int S, bool high, int... lane>
inline vec exchange(vec a, vec b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (high ? (lane & S ? W + lane : lane + S) : (lane & S ? W + lane - S : lane))...);
#else
  return __builtin_shuffle(a, b, ivec{(high ? (lane & S ? W + lane : lane + S) : (lane & S ? W + lane - S : lane))...});
#endif
}
template <int S>
inline void transpose_squares(vec (&x)[W]) {
  if constexpr (S < W) {
    constexpr auto lanes = std::make_integer_sequence<int, W>();
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & S)) {
        vec a = x[i], b = x[i + S];
        x[i] = exchange<S, false>(a, b, lanes), x[i + S] = exchange<S, true>(a, b, lanes);
      }
    transpose_squares<2 * S>(x);
  }
}
// [rows, columns] to [columns, rows], both multiples of W.
inline void transpose(const float* from, int64_t ld, int64_t rows, int64_t columns, float* to, int64_t to_ld) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < columns; j += W) {
      vec x[W];
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) x[n] = load(from + (i + n) * ld + j);
      transpose_squares<1>(x);
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) store(to + (j + n) * to_ld + i, x[n]);
    }
}
