// Between tokens, whose channels lie side by side, and rows, whose tokens do: y[b, j, i] = x[b, i, j].
#include "native.h"

namespace {

constexpr int64_t STRETCH = 1024;

template <class X, class Y>
struct Call {
  int64_t B, I, J;
  const X* x;
  int64_t x_batch, x_i;  // strides; those of the last dimensions are 1
  Y* y;
  int64_t y_batch, y_j;
};

// W rows of x by W columns, through a tile that stays in the first-level cache: whole cache lines in and out. Asks for the
// lines of the tile below.
template <class X, class Y>
inline void tile(const Call<X, Y>& a, int64_t b, int64_t i, int64_t j) {
  alignas(64) float rows[W][W];
  const X* x = a.x + b * a.x_batch + i * a.x_i + j;
  Y* y = a.y + b * a.y_batch + j * a.y_j + i;
  for (int n = 0; n < W; ++n) {
    __builtin_prefetch(x + (n + W) * a.x_i);
    store(rows[n], load(x + n * a.x_i));
  }
  for (int m = 0; m < W; ++m) {
    vec column;
    for (int n = 0; n < W; ++n) column[n] = rows[n][m];
    __builtin_prefetch(y + m * a.y_j + W, 1);
    store(y + m * a.y_j, column);
  }
}

template <class X, class Y>
inline void edge(const Call<X, Y>& a, int64_t b, int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
  for (; j < j_end; ++j)
    for (int64_t n = i; n < i_end; ++n)
      put(a.y + b * a.y_batch + j * a.y_j + n, get<float>(a.x + b * a.x_batch + n * a.x_i + j));
}

template <class X, class Y>
void run(const Call<X, Y>& a) {
  const int64_t stretches = (a.I + STRETCH - 1) / STRETCH, stripes = (a.J + 2*W - 1) / (2*W);
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < a.B * stripes * stretches; ++task) {
    const int64_t b = task / (stripes * stretches), j = task / stretches % stripes * 2*W, j_end = std::min(a.J, j + 2*W);
    const int64_t first = task % stretches * STRETCH, last = std::min(a.I, first + STRETCH);
    int64_t i = first;
    const int64_t j_whole = j + (j_end - j) / W * W;
    for (; i + W <= last; i += W) {
      for (int64_t jj = j; jj < j_whole; jj += W) tile(a, b, i, jj);
      edge(a, b, i, i + W, j_whole, j_end);
    }
    edge(a, b, i, last, j, j_end);
  }
}

template <class X, class Y>
void run(const int64_t* n, const void* const* data) {
  run(Call<X, Y>{n[0], n[1], n[2], (const X*)data[0], n[3], n[4], (Y*)data[1], n[5], n[6]});
}

}  // namespace

// n: B I J, strides of x over B and I, of y over B and J, in elements. data: x y.
extern "C" void transpose(int x_is_bf16, int y_is_bf16, const int64_t* n, const void* const* data) {
  if (x_is_bf16)
    y_is_bf16 ? run<bf16, bf16>(n, data) : run<bf16, float>(n, data);
  else
    y_is_bf16 ? run<float, bf16>(n, data) : run<float, float>(n, data);
}
