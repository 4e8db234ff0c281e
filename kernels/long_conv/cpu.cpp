// Long convolution on CPUs by FFT, W channels side by side in a vector: tokens need no transposition, and the
// transforms shuffle no vector.
//
// Real polynomials are multiplied modulo x^N + 1, N = 2M, as complex ones modulo x^M - i: the upper half of the N real
// numbers is the imaginary part of the lower one. x^n - c factors into R polynomials x^(n/R) - c_k, the c_k being
// the R-th roots of c: multiply numbers that are n/R apart by the powers of c_0, then take their DFT of size R. After
// the last level the residues are numbers, in a scrambled order that a product does not mind; the way back undoes the
// levels. A level is one pass, and its parts are finished one by one, with the kernel's, so that all but the first
// passes stay in the second-level cache. The first pass reads the tokens, its inverse writes them.

#include <cmath>
#include <map>
#include <memory>
#include <mutex>

#include "native.h"

namespace {

constexpr int64_t POINT = 2 * W;  // floats of a point: real parts, imaginary parts
constexpr int MAX_RADIX = 8;
constexpr int64_t AHEAD = 8;  // tokens between what is accessed and what is prefetched

struct cvec {
  vec r, i;
};
inline cvec operator+(cvec a, cvec b) { return {a.r + b.r, a.i + b.i}; }
inline cvec operator-(cvec a, cvec b) { return {a.r - b.r, a.i - b.i}; }
inline cvec operator*(cvec a, cvec b) { return {a.r * b.r - a.i * b.i, a.r * b.i + a.i * b.r}; }
inline cvec over(cvec a, cvec b) { return {a.r * b.r + a.i * b.i, a.i * b.r - a.r * b.i}; }  // a ~b
inline cvec times(cvec a, const float* w) { return {a.r * w[0] - a.i * w[1], a.r * w[1] + a.i * w[0]}; }
inline cvec over(cvec a, const float* w) { return {a.r * w[0] + a.i * w[1], a.i * w[0] - a.r * w[1]}; }
inline cvec fma(float a, cvec x, cvec y) { return {y.r + a * x.r, y.i + a * x.i}; }
// By i where S is 1, by -i where it is -1.
template <int S>
[[gnu::always_inline]] inline cvec turn(cvec a) {
  return S > 0 ? cvec{-a.i, a.r} : cvec{a.i, -a.r};
}
inline cvec get(const float* p) { return {load(p), load(p + W)}; }
inline void put(float* p, cvec x) { store(p, x.r), store(p + W, x.i); }

// x_k = sum_m x_m exp(S 2 pi i m k / R).
template <int R, int S>
[[gnu::always_inline]] inline void dft(cvec* x) {
  if constexpr (R == 2) {
    cvec a = x[0];
    x[0] = a + x[1], x[1] = a - x[1];
  } else if constexpr (R == 3) {
    cvec sum = x[1] + x[2], rest = fma(-0.5f, sum, x[0]), d = turn<S>(x[1] - x[2]);
    x[0] = x[0] + sum, x[1] = fma(0.866025403784438647f, d, rest), x[2] = fma(-0.866025403784438647f, d, rest);
  } else if constexpr (R == 4) {
    cvec a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = turn<S>(x[1] - x[3]);
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  } else if constexpr (R == 5) {
    constexpr float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f, s1 = 0.951056516295153572f,
                    s2 = 0.587785252292473129f;
    cvec a = x[1] + x[4], b = x[2] + x[3], c = turn<S>(x[1] - x[4]), d = turn<S>(x[2] - x[3]);
    cvec p = fma(c1, a, fma(c2, b, x[0])), q = fma(c2, a, fma(c1, b, x[0]));
    cvec s{s1 * c.r + s2 * d.r, s1 * c.i + s2 * d.i}, t{s2 * c.r - s1 * d.r, s2 * c.i - s1 * d.i};
    x[0] = x[0] + a + b, x[1] = p + s, x[2] = q + t, x[3] = q - t, x[4] = p - s;
  } else {
    static_assert(R == 8);
    cvec even[4], odd[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) even[m] = x[m] + x[m + 4], odd[m] = x[m] - x[m + 4];
    dft<4, S>(even);
    // The odd ones are turned by m/8 of a circle; sqrt(1/2) comes last, where it costs nothing.
    cvec a = odd[0] + turn<S>(odd[2]), b = odd[0] - turn<S>(odd[2]);
    cvec c = odd[1] + turn<S>(odd[1]), d = turn<S>(odd[3]) - odd[3];
    cvec sum = c + d, rest = turn<S>(c - d);
    constexpr float half = 0.707106781186547524f;
    x[0] = even[0], x[2] = even[1], x[4] = even[2], x[6] = even[3];
    x[1] = fma(half, sum, a), x[5] = fma(-half, sum, a), x[3] = fma(half, rest, b), x[7] = fma(-half, rest, b);
  }
}

// From the numbers of one polynomial to those of its R factors, and back, R times as large.
template <int R>
[[gnu::always_inline]] inline void split(cvec* x, const float* w) {
#pragma GCC unroll 8
  for (int m = 1; m < R; ++m) x[m] = times(x[m], w + 2 * (m - 1));
  dft<R, 1>(x);
}
template <int R>
[[gnu::always_inline]] inline void unite(cvec* x, const float* w) {
  dft<R, -1>(x);
#pragma GCC unroll 8
  for (int m = 1; m < R; ++m) x[m] = over(x[m], w + 2 * (m - 1));
}

// The factorization of M points: level by level the radix, the points of a polynomial before, and for each of those, in
// order, the powers 1 to R - 1 of its c_0.
struct Level {
  int radix;
  int64_t points;
  std::vector<float> powers;
  const float* at(int64_t node) const { return powers.data() + node * 2 * (radix - 1); }
};
struct Plan {
  std::vector<Level> levels;
  std::vector<float> last;  // powers 0 to R - 1 of the first level, over M
};

// The first and the last are powers of two, as large as can be; between them 4 4 rather than 8 2.
std::vector<int> radices(int64_t points) {
  std::vector<int> all;
  for (int odd : {3, 5})
    for (; points % odd == 0; points /= odd) all.push_back(odd);
  int twos = 0;
  while (int64_t(1) << twos < points) ++twos;
  const int first = std::min(3, twos / 2 + (twos == 5)), last = std::min(3, twos - first);
  twos -= first + last;
  if (twos == 1) all.push_back(2), twos = 0;
  for (; twos % 3 != 0; twos -= 2) all.push_back(4);
  all.insert(all.begin(), twos / 3, 8);
  all.insert(all.begin(), 1 << first);
  all.push_back(1 << last);
  return all;
}

const Plan& plan_for(int64_t points) {
  static std::mutex lock;
  static std::map<int64_t, std::unique_ptr<const Plan>> plans;
  const std::lock_guard<std::mutex> held(lock);
  auto& found = plans[points];
  if (found) return *found;
  auto plan = std::make_unique<Plan>();
  constexpr double circle = 6.283185307179586477;
  std::vector<double> turns{0.25};  // of every polynomial x^n - exp(2 pi i turn)
  int64_t n = points;
  for (int radix : radices(points)) {
    Level level{radix, n, {}};
    std::vector<double> next;
    for (double turn : turns) {
      for (int m = 1; m < radix; ++m) {
        const double angle = circle * turn * m / radix;
        level.powers.push_back(float(std::cos(angle))), level.powers.push_back(float(std::sin(angle)));
      }
      for (int k = 0; k < radix; ++k) next.push_back((turn + k) / radix);
    }
    plan->levels.push_back(std::move(level));
    turns = std::move(next);
    n /= radix;
  }
  for (int m = 0; m < plan->levels[0].radix; ++m) {
    const double angle = circle * 0.25 * m / plan->levels[0].radix;
    plan->last.push_back(float(std::cos(angle) / double(points)));
    plan->last.push_back(float(std::sin(angle) / double(points)));
  }
  found = std::move(plan);
  return *found;
}

template <class F>
inline void with_radix(int radix, F body) {
  switch (radix) {
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    case 5: return body(std::integral_constant<int, 5>());
    default: return body(std::integral_constant<int, 8>());
  }
}

// One level of one polynomial, there or back.
template <int R, bool back>
void pass(float* data, int64_t points, const float* w) {
  const int64_t step = points / R * POINT;
  for (float *p = data, *end = data + step; p < end; p += POINT) {
    cvec x[R];
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) x[m] = get(p + m * step);
    back ? unite<R>(x, w) : split<R>(x, w);
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) put(p + m * step, x[m]);
  }
}
template <bool back>
inline void pass(const Level& level, int64_t node, float* data) {
  float* from = data + node * level.points * POINT;
  with_radix(level.radix, [&](auto radix) { pass<radix(), back>(from, level.points, level.at(node)); });
}

// The points of one stripe of W channels.
struct Stripe {
  float *kernel, *x, *grad, *sum;  // grad and sum null forward; sum may be x where there is one row
  bool first, last;                // of the rows
};

template <int R>
[[gnu::always_inline]] inline void load_split(const float* p, const float* w, cvec* x) {
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) x[m] = get(p + m * POINT);
  split<R>(x, w);
}
template <int R>
[[gnu::always_inline]] inline void unite_store(float* p, const float* w, cvec* x) {
  unite<R>(x, w);
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) put(p + m * POINT, x[m]);
}

// The last level, the products, and the way back from it.
template <int R, bool gradients>
[[gnu::always_inline]] inline void multiply(const Stripe& s, int64_t offset, const float* w) {
  cvec x[R];
  float *kernel = s.kernel + offset, *tokens = s.x + offset;
  if (s.first) {
    load_split<R>(kernel, w, x);
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) put(kernel + m * POINT, x[m]);
  }
  load_split<R>(tokens, w, x);
  if (!gradients) {
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) x[m] = x[m] * get(kernel + m * POINT);
    return unite_store<R>(tokens, w, x);
  }
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) put(tokens + m * POINT, x[m]);
  float *grad = s.grad + offset, *sum = s.sum + offset;
  load_split<R>(grad, w, x);
  for (int m = 0; m < R; ++m) {
    cvec product = over(x[m], get(tokens + m * POINT));
    put(sum + m * POINT, s.first ? product : product + get(sum + m * POINT));
  }
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) x[m] = over(x[m], get(kernel + m * POINT));
  unite_store<R>(grad, w, x);
  if (!s.last) return;
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) x[m] = get(sum + m * POINT);
  unite_store<R>(sum, w, x);
}

// All levels behind the first of one polynomial, there and back.
template <bool gradients>
void convolve(const Plan& plan, size_t depth, int64_t node, const Stripe& s) {
  const Level& level = plan.levels[depth];
  if (depth + 1 == plan.levels.size()) {
    with_radix(level.radix, [&](auto radix) {
      multiply<radix(), gradients>(s, node * level.points * POINT, level.at(node));
    });
    return;
  }
  if (s.first) pass<false>(level, node, s.kernel);
  pass<false>(level, node, s.x);
  if (gradients) pass<false>(level, node, s.grad);
  for (int k = 0; k < level.radix; ++k) convolve<gradients>(plan, depth + 1, node * level.radix + k, s);
  if (!gradients) return pass<true>(level, node, s.x);
  pass<true>(level, node, s.grad);
  if (s.last) pass<true>(level, node, s.sum);
}

// Calls body(j, end) for subranges of [0, step) in which j + q step is in [low, high) for all j or for none, for any q.
template <class F>
inline void subranges(int64_t step, int64_t low, int64_t high, F body) {
  int64_t cuts[4] = {0, low % step, high % step, step};
  std::sort(cuts, cuts + 4);
  for (int n = 0; n < 3; ++n)
    if (cuts[n] < cuts[n + 1]) body(cuts[n], cuts[n + 1]);
}

// The first level of the points [j, end) of every part, from 2 R places (R where upper halves are zero), and back.
template <int R, bool real, class X>
void enter(float* data, int64_t step, int64_t j, int64_t end, const X* const* from, const int64_t* steps,
           const float* w) {
  for (int64_t n = 0; j + n < end; ++n) {
    cvec x[R];
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) {
      x[m].r = load(from[m] + n * steps[m]);
      __builtin_prefetch(from[m] + (n + AHEAD) * steps[m]);
      if (real) {
        x[m] = m ? cvec{x[m].r * w[2 * m - 2], x[m].r * w[2 * m - 1]} : cvec{x[0].r, vec{}};
        continue;
      }
      x[m].i = load(from[R + m] + n * steps[R + m]);
      __builtin_prefetch(from[R + m] + (n + AHEAD) * steps[R + m]);
      if (m) x[m] = times(x[m], w + 2 * m - 2);
    }
    dft<R, 1>(x);
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) put(data + (m * step + j + n) * POINT, x[m]);
  }
}
template <int R, bool real, class X>
void leave(const float* data, int64_t step, int64_t j, int64_t end, X* const* to, const int64_t* steps,
           const float* w) {
  for (int64_t n = 0; j + n < end; ++n) {
    cvec x[R];
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) x[m] = get(data + (m * step + j + n) * POINT);
    dft<R, -1>(x);
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) {
      __builtin_prefetch(to[m] + (n + AHEAD) * steps[m], 1);
      store(to[m] + n * steps[m], x[m].r * w[2 * m] + x[m].i * w[2 * m + 1]);
      if (!real) store(to[R + m] + n * steps[R + m], x[m].i * w[2 * m] - x[m].r * w[2 * m + 1]);
    }
  }
}

// A stripe of the tokens that are at the places [low, low + count) of the N.
template <class X>
struct StripeTokens {
  X* data;                    // of the first
  int64_t token, low, count;  // token: stride
};

template <class X>
void enter(const Plan& plan, float* data, const StripeTokens<const X>& range) {
  const Level& level = plan.levels[0];
  static const X zeros[W] = {};
  with_radix(level.radix, [&](auto radix) {
    constexpr int R = radix();
    const int64_t step = level.points / R, high = range.low + range.count;
    subranges(step, range.low, high, [&](int64_t j, int64_t end) {
      const X* from[2 * R];
      int64_t steps[2 * R];
      for (int q = 0; q < 2 * R; ++q) {
        const int64_t place = j + q * step;
        const bool any = place >= range.low && place < high;
        from[q] = any ? range.data + (place - range.low) * range.token : zeros;
        steps[q] = any ? range.token : 0;
      }
      (high <= level.points ? enter<R, true, X> : enter<R, false, X>)(data, step, j, end, from, steps, level.at(0));
    });
  });
}
template <class X>
void leave(const Plan& plan, const float* data, const StripeTokens<X>& range) {
  const Level& level = plan.levels[0];
  X unread[W];
  with_radix(level.radix, [&](auto radix) {
    constexpr int R = radix();
    const int64_t step = level.points / R, high = range.low + range.count;
    subranges(step, range.low, high, [&](int64_t j, int64_t end) {
      X* to[2 * R];
      int64_t steps[2 * R];
      bool wanted = false;
      for (int q = 0; q < 2 * R; ++q) {
        const int64_t place = j + q * step;
        const bool any = place >= range.low && place < high;
        to[q] = any ? range.data + (place - range.low) * range.token : unread;
        steps[q] = any ? range.token : 0;
        wanted |= any;
      }
      auto pass = high <= level.points ? leave<R, true, X> : leave<R, false, X>;
      if (wanted) pass(data, step, j, end, to, steps, plan.last.data());
    });
  });
}

// The W vectors at x, as rows and columns. Dealing the rows out like cards, log2(W) times.
[[gnu::always_inline]] inline void transpose(vec* x) {
#if defined(__clang__)
  const auto zip = [](vec a, vec b, int from) {
    vec y{};
    for (int l = 0; l < W; ++l) y[l] = (l % 2 ? b : a)[from + l / 2];
    return y;
  };
#else
  const auto zip = [](vec a, vec b, int from) {
    ivec places{};
    for (int l = 0; l < W; ++l) places[l] = from + l / 2 + l % 2 * W;
    return __builtin_shuffle(a, b, places);
  };
#endif
#pragma GCC unroll 4
  for (int n = 1; n < W; n *= 2) {
    vec y[W];
#pragma GCC unroll 8
    for (int k = 0; k < W / 2; ++k)
      y[2 * k] = zip(x[k], x[k + W / 2], 0), y[2 * k + 1] = zip(x[k], x[k + W / 2], W / 2);
#pragma GCC unroll 16
    for (int k = 0; k < W; ++k) x[k] = y[k];
  }
}

// Some neighbouring taps of up to W channels: [lanes, taps], those of a channel side by side.
template <class X>
struct Taps {
  X* data;
  int64_t channel, count;  // channel: stride
  int64_t lanes;
};

// Up to W of them from tap t on, zeros beyond the last, as W points.
template <class X>
[[gnu::always_inline]] inline void read(const Taps<const X>& taps, int64_t t, float* tile) {
  vec x[W];
  const int64_t count = std::min<int64_t>(W, taps.count - t);
  if (count == W && taps.lanes == W) {
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) {
      x[c] = load(taps.data + c * taps.channel + t);
      __builtin_prefetch(taps.data + c * taps.channel + t + 2 * W, 0, 2);
    }
  } else {
    for (int c = 0; c < W; ++c) {
      X row[W] = {};
      if (c < taps.lanes && count > 0) std::memcpy(row, taps.data + c * taps.channel + t, count * sizeof(X));
      x[c] = load(row);
    }
  }
  transpose(x);
#pragma GCC unroll 16
  for (int k = 0; k < W; ++k) store(tile + k * W, x[k]);
}
[[gnu::always_inline]] inline void write(const Taps<float>& taps, int64_t t, const float* tile, bool add) {
  vec x[W];
  const int64_t count = std::min<int64_t>(W, taps.count - t);
#pragma GCC unroll 16
  for (int k = 0; k < W; ++k) x[k] = load(tile + k * W);
  transpose(x);
  for (int c = 0; c < taps.lanes; ++c) {
    float* to = taps.data + c * taps.channel + t;
    if (count == W) {
      store(to, add ? load(to) + x[c] : x[c]);
    } else {
      for (int k = 0; k < count; ++k) to[k] = (add ? to[k] : 0.0f) + x[c][k];
    }
  }
}

// As of tokens, by W points of every part at a time. `skip` is added to the tap `centre`.
template <class X>
void enter(const Plan& plan, float* data, const Taps<const X>& taps, int64_t centre, const float* skip) {
  const Level& level = plan.levels[0];
  alignas(64) float tiles[2 * MAX_RADIX][W * W];
  with_radix(level.radix, [&](auto radix) {
    constexpr int R = radix();
    const int64_t step = level.points / R;
    const int used = taps.count <= level.points ? R : 2 * R;
    const float* from[2 * R];
    int64_t steps[2 * R];
    for (int q = 0; q < used; ++q) from[q] = tiles[q], steps[q] = W;
    for (int64_t j = 0; j < step; j += W) {
      for (int q = 0; q < used; ++q) {
        const int64_t t = j + q * step;
        t < taps.count ? read(taps, t, tiles[q]) : (void)std::fill_n(tiles[q], W * W, 0.0f);
        if (skip && t <= centre && centre < t + W)
          for (int c = 0; c < taps.lanes; ++c) tiles[q][(centre - t) * W + c] += skip[c];
      }
      const int64_t end = std::min(step, j + W);
      (used == R ? enter<R, true, float> : enter<R, false, float>)(data, step, j, end, from, steps, level.at(0));
    }
  });
}
void leave(const Plan& plan, const float* data, const Taps<float>& taps, bool add) {
  const Level& level = plan.levels[0];
  alignas(64) float tiles[2 * MAX_RADIX][W * W];
  with_radix(level.radix, [&](auto radix) {
    constexpr int R = radix();
    const int64_t step = level.points / R;
    const int used = taps.count <= level.points ? R : 2 * R;
    float* to[2 * R];
    int64_t steps[2 * R];
    for (int q = 0; q < used; ++q) to[q] = tiles[q], steps[q] = W;
    for (int64_t j = 0; j < step; j += W) {
      const int64_t end = std::min(step, j + W);
      (used == R ? leave<R, true, float> : leave<R, false, float>)(data, step, j, end, to, steps, plan.last.data());
      for (int q = 0; q < used; ++q) {
        // A part may be shorter than a tile.
        const int64_t t = j + q * step;
        const Taps<float> some{taps.data, taps.channel, std::min(taps.count, t + end - j), taps.lanes};
        if (t < some.count) write(some, t, tiles[q], add);
      }
    }
  });
}

// Tokens [B, T + L, D] whose first `hidden` are not there at all: the data begins behind them.
template <class X>
struct Tokens {
  X* data;
  int64_t row, token, hidden;  // strides, tokens
};
// Tokens that are convolved with each other: [first, first + count) of the T + L of a row of the batch.
struct Row {
  int64_t b, first, count;
};

template <class X, class K>
struct Call {
  int64_t points, D, taps, centre, num_rows;  // centre: the tap of the current token
  const Row* rows;
  Tokens<const X> x, grad;
  Tokens<X> out;  // y forward, dx backward
  const K* kernel;
  int64_t kernel_channel;
  const float* skip;  // [D] or null
  float* dtaps;  // or null: forward
  int64_t dtaps_channel;
  bool add;
  int64_t threads;
  float* workspace;
  int64_t room;  // floats of workspace for each thread
};

// The part of a row that exists, its token n at place + n; data of the stripe at channel c.
template <class X>
inline StripeTokens<X> range(const Tokens<X>& tokens, const Row& row, int64_t c, int64_t place) {
  const int64_t skipped = std::clamp<int64_t>(tokens.hidden - row.first, 0, row.count);
  const int64_t token = row.first + skipped - tokens.hidden;
  X* data = tokens.data + row.b * tokens.row + token * tokens.token + c;
  return {data, tokens.token, place + skipped, row.count - skipped};
}

// A stripe of fewer channels than W goes through a copy of whole vectors.
template <class X>
void enter(const Plan& plan, float* data, const StripeTokens<const X>& range, int64_t lanes, float* copy) {
  if (lanes == W) return enter(plan, data, range);
  for (int64_t n = 0; n < range.count; ++n)
    for (int64_t c = 0; c < W; ++c) copy[n * W + c] = c < lanes ? to_float(range.data[n * range.token + c]) : 0.0f;
  enter(plan, data, StripeTokens<const float>{copy, W, range.low, range.count});
}
template <class X>
void leave(const Plan& plan, const float* data, const StripeTokens<X>& range, int64_t lanes, float* copy) {
  if (lanes == W) return leave(plan, data, range);
  leave(plan, data, StripeTokens<float>{copy, W, range.low, range.count});
  for (int64_t n = 0; n < range.count; ++n)
    for (int64_t c = 0; c < lanes; ++c) ::put(range.data + n * range.token + c, copy[n * W + c]);
}

// All levels of a stripe, forward or backward, over the rows [begin, end).
template <class X, class K, bool gradients>
void stripe(const Call<X, K>& a, const Plan& plan, int64_t c, int64_t begin, int64_t end, float* workspace) {
  const int64_t size = a.points * POINT, lanes = std::min<int64_t>(W, a.D - c);
  Stripe s{workspace, workspace + size, nullptr, nullptr, true, true};
  float* copy = workspace + 2 * size;
  if (gradients) {
    s.grad = copy, copy += size;
    s.sum = s.x;
    if (end - begin > 1) s.sum = copy, copy += size;
  }
  enter(plan, s.kernel, Taps<const K>{a.kernel + c * a.kernel_channel, a.kernel_channel, a.taps, lanes}, a.centre,
        a.skip ? a.skip + c : nullptr);
  for (int64_t r = begin; r < end; ++r) {
    const Row& row = a.rows[r];
    s.first = r == begin, s.last = r + 1 == end;
    enter(plan, s.x, range(a.x, row, c, 0), lanes, copy);
    if (gradients) enter(plan, s.grad, range(a.grad, row, c, a.centre), lanes, copy);
    for (int k = 0; k < plan.levels[0].radix; ++k) convolve<gradients>(plan, 1, k, s);
    if (gradients)
      leave(plan, s.grad, range(a.out, row, c, 0), lanes, copy);
    else
      leave(plan, s.x, range(a.out, row, c, a.centre), lanes, copy);
  }
  if (gradients) leave(plan, s.sum, Taps<float>{a.dtaps + c * a.dtaps_channel, a.dtaps_channel, a.taps, lanes}, a.add);
}

template <class X, class K>
void run(const Call<X, K>& a) {
  const Plan& plan = plan_for(a.points);
  const int64_t stripes = (a.D + W - 1) / W;
  // Rows share the kernel's transform, and gradients add up over them in one order.
  const int64_t groups = a.dtaps ? 1 : std::clamp<int64_t>(a.threads / std::max<int64_t>(stripes, 1), 1, a.num_rows);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t task = 0; task < stripes * groups; ++task) {
    float* workspace = a.workspace + omp_get_thread_num() * a.room;
    const int64_t c = task / groups * W, g = task % groups;
    const int64_t begin = a.num_rows * g / groups, end = a.num_rows * (g + 1) / groups;
    (a.dtaps ? stripe<X, K, true> : stripe<X, K, false>)(a, plan, c, begin, end, workspace);
  }
}

template <class X, class K>
void run(const int64_t* n, const void* const* p) {
  run(Call<X, K>{n[0], n[1], n[2], n[3], n[4], (const Row*)p[0], {(const X*)p[1], n[5], n[6], 0},
                 {(const X*)p[2], n[7], n[8], n[11]}, {(X*)p[3], n[9], n[10], p[6] ? 0 : n[11]}, (const K*)p[4], n[12],
                 (const float*)p[5], (float*)p[6], n[13], bool(n[14]), n[15], (float*)p[7], n[16]});
}

}  // namespace

// n: M D taps centre rows, strides over rows and tokens of x, grad and out, T carried tokens, strides over channels of
// kernel and dtaps, whether to add to dtaps, threads, floats of workspace for each.
// p: rows [rows, 3], x [B, T + L, D], grad [B, L, D] or null, out, kernel [D, taps], skip [D] or null, dtaps [D, taps]
// or null, workspace. Forward out is y [B, L, D]; given dtaps and grad, backward, it is dx [B, T + L, D].
extern "C" void long_conv_fft(int x_is_bf16, int kernel_is_bf16, const int64_t* n, const void* const* p) {
  if (x_is_bf16)
    kernel_is_bf16 ? run<bf16, bf16>(n, p) : run<bf16, float>(n, p);
  else
    kernel_is_bf16 ? run<float, bf16>(n, p) : run<float, float>(n, p);
}

// Channels in a stripe.
extern "C" int64_t lanes() { return W; }
