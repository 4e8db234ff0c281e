// Linear attention on CPUs: a thread runs over one head's chunks of C tokens, whose products stay in its caches.
//
// Every result is one recurrence (README.md) of queries r, keys k, values v and a state S,
//
//   out_i = state_to_token_i r_i S + sum_j pair_decay_ij (r_i . k_j) v_j,
//   S <- decay_over_chunk S + sum_j token_to_state_j k_j^T v_j
//
//   y: q of (k, v)     dq: g of (v, k)     and from right to left     dv: k of (q, g)     dk: v of (g, q)
//
// With a decay of each token, exp(log_decay), a chunk's weights are made of the sums of its logarithms. The gradient of
// log_decay is the sum of all that passes a token: between tokens of its chunk, from the state before the chunk to later
// tokens, from earlier tokens to the state after it, and from one state to the other. The last is <S, R> after the chunk
// less what the chunk's tokens contribute to it; every SPAN tokens <S, R> is computed anew, so that its error does not
// grow with the length.
//
// A document sees nothing of another one, NaN and infinities included: where one begins in a chunk, sums of decays start
// anew, and what is not finite does not take part in products with weights of 0.
//
// A chunk's rows are packed once as fp32, padded with zeros to whole vectors. Products are sums of R x N vectors in
// registers. A chunk's sum starts from zero; sums over chunks are fp64.
#include "matrix.h"

#include <cmath>
#include <cstdlib>
#include <memory>

namespace {

constexpr int C = 32;               // tokens of a chunk, a multiple of W: what it packs nearly fits a first-level cache
constexpr int R = TILE;
constexpr float LEAST_LOG_DECAY = -1000;  // whose exponential is 0 in fp64, too
constexpr int64_t SPAN = 16 * C;    // tokens after which <S, R> is computed anew
constexpr int64_t CACHE = 1 << 19;  // bytes of a second-level cache for states

// What fills a register as doubles.
typedef float half_vec __attribute__((vector_size(2 * W)));
typedef double half_dvec __attribute__((vector_size(4 * W)));

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// A tensor [B, L, heads, n] of floats or bf16 with contiguous last axis, each of whose heads serves `sharing` consecutive
// ones of the values'; strides in bytes.
struct Rows {
  char* data;
  int64_t row, token, head, n;
  bool half;
  int64_t sharing;

  explicit operator bool() const { return data; }
  Rows of(int64_t b, int64_t h) const {
    Rows one = *this;
    if (data) one.data += b * row + h / sharing * head;
    return one;
  }

  // Tokens [first, first + count) times factor, as rows of ld floats; up to a multiple of W rows, the rest is zeros.
  void pack(int64_t first, int64_t count, float factor, float* to, int64_t ld) const {
    half ? pack_as<bf16>(first, count, factor, to, ld) : pack_as<float>(first, count, factor, to, ld);
    std::memset(to + count * ld, 0, sizeof(float) * (up(count, W) - count) * ld);
  }
  void unpack(int64_t first, int64_t count, const float* from, int64_t ld) const {
    half ? unpack_as<bf16>(first, count, from, ld) : unpack_as<float>(first, count, from, ld);
  }
  // Prefetches a token's row, to be read or written. Inlined because GCC drops calls of functions that only prefetch.
  __attribute__((always_inline)) void prefetch(int64_t index, bool write) const {
    const char* p = data + index * token;
    for (int64_t byte = 0; byte < n * (half ? 2 : 4); byte += 64)
      write ? __builtin_prefetch(p + byte, 1) : __builtin_prefetch(p + byte, 0);
  }

 private:
  template <class X>
  void pack_as(int64_t first, int64_t count, float factor, float* to, int64_t ld) const {
    for (int64_t i = 0; i < count; ++i, to += ld) {
      const X* p = (const X*)(data + (first + i) * token);
      int64_t c = 0;
      for (; c + W <= n; c += W) store(to + c, load(p + c) * factor);
      for (; c < n; ++c) to[c] = widen(p[c]) * factor;
      for (; c < ld; ++c) to[c] = 0;
    }
  }
  template <class X>
  void unpack_as(int64_t first, int64_t count, const float* from, int64_t ld) const {
    for (int64_t i = 0; i < count; ++i, from += ld) {
      X* p = (X*)(data + (first + i) * token);
      int64_t c = 0;
      for (; c + W <= n; c += W) store(p + c, load(from + c));
      if (c < n) {
        X last[W];
        store(last, load(from + c));
        for (int64_t lane = 0; c < n; ++c, ++lane) p[c] = last[lane];
      }
    }
  }
};

// The rows needed next, prefetched a few at a time: a head's rows are strided, which hardware does not prefetch.
struct Ahead {
  const Rows* tensors[6];
  int count, num_inputs;
  int64_t b = 0, h = 0, next = 0, stop = 0;

  void prefetch_some() {
    for (int64_t last = std::min(stop, next + 2); next < last; ++next)
      for (int t = 0; t < count; ++t) tensors[t]->of(b, h).prefetch(next, t >= num_inputs);
  }
};

struct Call {
  int64_t B, L, H, K, V;  // V without the column of ones
  Rows q, k, v, g, y, dq, dk, dv;
  const uint8_t* document_starts;  // [B, L], 1 where a document starts (not at the shard's first token), or null
  const float* initial;            // [B, H, K, V or V + 1], or null for zeros
  const float* final_grad;         // the gradient of the final state, likewise
  float* final;                    // the final state, or backward the gradient of the initial one, likewise, or null
  float* divisor;                  // [B, L, H], written forward and read backward, or null
  const double* decays;            // [H], or null for 1
  const float* log_decay;          // [B, L, H], or null
  float* dlog_decay;               // [B, L, H], its gradient, or null
  bool normalize;                  // whether v has a column of ones after it, whose sums divide the others
  float scale, eps;
  int64_t heads;  // of a task
};

// The weights between a chunk's tokens, the state before it and the state after it, for one head.
struct Chunk {
  int64_t first, count;
  int64_t tail_first, tail_stop;  // tokens of the last document (the first one from right to left)
  int64_t sees_first, sees_stop;  // tokens that see the state before the chunk
  double decay_over_chunk;
  bool weighted, cut;  // whether a state_to_token is not 1; whether a document starts in the chunk
  const float* pair_decay;     // of key j and query i at j pair_step + i; 0 where the query does not see the key
  int64_t pair_step;
  alignas(64) float state_to_token[C], token_to_state[C];
  alignas(64) int32_t seen_first[C], seen_stop[C];  // each token's keys of the same document
};

// Consecutive heads of one row of the batch, the work of one thread, and its buffers.
class Heads {
 public:
  explicit Heads(const Call& x)
      : x(x), ones(x.normalize), Vs(x.V + ones), Kw(up(x.K, W)), Vw(up(Vs, W)), heads(x.heads) {
    const int64_t wide = std::max(Kw, Vw), size = Kw * Vw, spans = x.dlog_decay ? up(x.L, SPAN) / SPAN : 0;
    const int64_t sums = x.dq.sharing > 1 ? 2 * Kw : 0, pairs = x.log_decay ? 2 * C + W : 0;
    const int64_t chunk = C * (2 * Kw + 2 * Vw + 2 * wide + C + sums + pairs);
    const int64_t norms = x.dlog_decay ? up(up(x.L, C) / C, 16) : 0;
    memory.reset(new Line[(chunk + (1 + (3 + spans) * x.heads) * size + norms * x.heads) / 16]);
    float* next = memory[0].x;
    auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    keys_k = take(C * Kw), keys_v = take(C * Vw), transposed_k = take(C * Kw), transposed_v = take(C * Vw);
    spare = take(C * wide), out = take(C * wide), scores = take(C * C), transposed_state = take(size);
    group_dq = take(C * sums / 2), group_dk = take(C * sums / 2), pair_decays = take(C * std::min<int64_t>(pairs, C));
    pair_products = take(C * std::min<int64_t>(pairs, C)), state_products = take(C * std::min<int64_t>(pairs, W));
    for (Head& head : heads) {
      head.state = take(size), head.total = (double*)take(2 * size), head.at_spans = take(spans * size);
      head.norms = take(norms);
    }
  }

  void forward(int64_t row, int64_t first, int64_t stop) {
    enter(row, first, stop, false, x.initial, false);
    ahead = x.y ? Ahead{{&x.k, &x.v, &x.q, &x.y}, 4, 3} : Ahead{{&x.k, &x.v}, 2, 2};
    for_chunks(false, [&](const Chunk& at) {
      pack(x.k, at, keys_k, Kw), pack_v(at, keys_v);
      if (x.y) {
        pack(x.q, at, spare, Kw, x.scale);
        transpose_chunk(spare, Kw, at, transposed_k);
        score(at, keys_k, Kw, transposed_k, x.K, false);
        read(at, transposed_k, x.K, head->state, keys_v, Vw, false);
        if (ones) divide(at);
        unpack(x.y, at, Vw);
      }
      update(at, keys_k, Kw, keys_v, Vw);
    });
    leave();
  }

  // dq; the states are transposed, [V, K].
  void left_to_right(int64_t row, int64_t first, int64_t stop) {
    enter(row, first, stop, false, x.initial, true);
    ahead = ones ? Ahead{{&x.k, &x.v, &x.g, &x.y, &x.dq}, 5, 4} : Ahead{{&x.k, &x.v, &x.g, &x.dq}, 4, 3};
    for_chunks(false, [&](const Chunk& at) {
      pack(x.k, at, keys_k, Kw), pack_v(at, keys_v), pack_g(at, spare);
      transpose_chunk(spare, Vw, at, transposed_v);
      score(at, keys_v, Vw, transposed_v, Vs, false);
      if (x.dlog_decay) pack(x.q, at, spare, Kw);
      read(at, transposed_v, Vs, head->state, keys_k, Kw, false, x.dlog_decay ? spare : nullptr);
      if (x.dlog_decay)
        for (int64_t i = 0; i < at.count; ++i) *dlog_decay(at, i) = state_product(at, i);
      if (x.dlog_decay) head->norms[at.first / C] = norm(head->state);
      unpack_shared(x.dq, at, group_dq);
      update(at, keys_v, Vw, keys_k, Kw);
      if (x.dlog_decay && ends_span(at)) std::memcpy(at_span(at), head->state, sizeof(float) * Kw * Vw);
    });
  }

  // dk and dv (unless null), and the gradient of the initial state.
  void right_to_left(int64_t row, int64_t first, int64_t stop) {
    enter(row, first, stop, true, x.final_grad, false);
    ahead = x.dk ? Ahead{{&x.q, &x.g, &x.k, &x.v, &x.dk, &x.dv}, 6, 4} : Ahead{{&x.q, &x.g}, 2, 2};
    for_chunks(true, [&](const Chunk& at) {
      pack(x.q, at, keys_k, Kw), pack_g(at, keys_v);
      if (x.dk) {
        pack(x.k, at, spare, Kw);
        transpose_chunk(spare, Kw, at, transposed_k);
        score(at, keys_k, Kw, transposed_k, x.K, true);
        read(at, transposed_k, x.K, head->state, keys_v, Vw, true);
        unpack(x.dv, at, Vw);
        pack_v(at, spare);
        transpose_chunk(spare, Vw, at, transposed_v);
        transpose(head->state, Vw, Kw, Vw, transposed_state, Kw);
        score(at, keys_v, Vw, transposed_v, Vs, true, x.dlog_decay ? pair_products : nullptr);
        if (x.dlog_decay) pack(x.k, at, spare, Kw);
        read(at, transposed_v, Vs, transposed_state, keys_k, Kw, true, x.dlog_decay ? spare : nullptr);
        if (x.dlog_decay) sum_log_decay_grads(at);
        unpack_shared(x.dk, at, group_dk);
      }
      update(at, keys_k, Kw, keys_v, Vw);
    });
    leave();
  }

 private:
  struct alignas(64) Line {
    float x[16];
  };
  struct Head {
    float* state;         // before the chunk, [K, V]
    double* total;        // likewise
    float* at_spans;      // the states after each SPAN tokens, [V, K]
    float* norms;         // of the states before the chunks
    double passing;       // <S, R> after the chunk
    bool decays;          // whether the decay is not 1
    double powers[C + 1];
    float pair_decay[2 * C];  // decay between key j and query i, at C + i - j
  };

  void enter(int64_t row, int64_t first, int64_t stop, bool to_left, const float* from, bool transposed) {
    b = row, first_head = first, stop_head = stop;
    for (h = first; h < stop; ++h) {
      head = &heads[h - first];
      const double decay = x.decays ? x.decays[h] : 1;
      head->decays = decay != 1 || x.log_decay;
      head->powers[0] = 1;
      for (int d = 1; d <= C; ++d) head->powers[d] = head->powers[d - 1] * decay;
      for (int d = 1 - C; d < C; ++d)
        head->pair_decay[C + d] = (to_left ? d > 0 : d < 0) ? 0 : float(head->powers[std::abs(d)]);
      std::memset(head->state, 0, sizeof(float) * Kw * Vw);
      if (from) {
        const float* p = from + (b * x.H + h) * x.K * Vs;
        for (int64_t k = 0; k < x.K; ++k, p += Vs)
          if (transposed)
            for (int64_t v = 0; v < Vs; ++v) head->state[v * Kw + k] = p[v];
          else
            std::memcpy(head->state + k * Vw, p, sizeof(float) * Vs);
      }
      add_before(0);
    }
  }
  void leave() const {
    if (!x.final) return;
    for (int64_t n = first_head; n < stop_head; ++n)
      for (int64_t k = 0; k < x.K; ++k)
        std::memcpy(x.final + ((b * x.H + n) * x.K + k) * Vs, heads[n - first_head].state + k * Vw, sizeof(float) * Vs);
  }

  // All heads of a chunk, which are adjacent in memory, before the next chunk.
  template <class Work>
  void for_chunks(bool to_left, Work work) {
    const int64_t step = to_left ? -C : C;
    for (int64_t first = to_left ? (x.L + C - 1) / C * C - C : 0; 0 <= first && first < x.L; first += step)
      for (h = first_head; h < stop_head; ++h) {
        head = &heads[h - first_head];
        const bool same = h + 1 < stop_head;
        ahead.b = b, ahead.h = same ? h + 1 : first_head;
        ahead.next = std::max<int64_t>(0, same ? first : first + step);
        ahead.stop = same || first + step >= 0 ? std::min(x.L, ahead.next + C) : 0;
        work(chunk(first, to_left));
      }
  }

  Chunk chunk(int64_t first, bool to_left) {
    Chunk at;
    const int64_t count = at.count = std::min<int64_t>(C, x.L - first);
    const uint8_t* document_starts = x.document_starts ? x.document_starts + b * x.L + first : nullptr;
    // The decay from before the chunk to each token, and from it to the chunk's end.
    alignas(64) float since[C], until[C];
    if (x.log_decay) {
      at.decay_over_chunk = weigh(first, count, document_starts, to_left, since, until);
      at.pair_decay = pair_decays, at.pair_step = C;
    } else {
      const double* powers = head->powers;
      for (int64_t i = 0; i < count; ++i) since[i] = float(powers[i + 1]), until[i] = float(powers[count - 1 - i]);
      at.decay_over_chunk = powers[count];
      at.pair_decay = head->pair_decay + C, at.pair_step = -1;
    }
    at.first = first, at.tail_first = 0, at.tail_stop = count, at.sees_first = 0, at.sees_stop = count;
    bool& cut = at.cut = to_left && document_starts && first + count < x.L && document_starts[count];
    if (cut) at.sees_first = count;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i = to_left ? count - 1 - n : n;
      if (!to_left && document_starts && document_starts[i]) {
        if (!cut) at.sees_stop = i;
        cut = true, at.tail_first = i;
      }
      at.seen_first[i] = int32_t(at.tail_first), at.seen_stop[i] = int32_t(at.tail_stop);
      at.state_to_token[i] = cut ? 0 : to_left ? until[i] : since[i];
      at.token_to_state[i] = to_left ? since[i] : until[i];
      if (to_left && document_starts && document_starts[i]) {
        if (!cut) at.sees_first = i;
        cut = true, at.tail_stop = i;
      }
    }
    for (int64_t i = count; i < C; ++i) at.seen_first[i] = at.seen_stop[i] = 0, at.state_to_token[i] = 0;
    at.weighted = cut || head->decays;
    if (cut) at.decay_over_chunk = 0;
    return at;
  }

  // Decays of a chunk from the logarithms of its tokens' own, whose sums are fp64: in fp32 their high and low parts. They
  // are right inside a document, `since` in the first and `until` in the last one. Returns the decay over the chunk.
  double weigh(int64_t first, int64_t count, const uint8_t* starts, bool to_left, float* since, float* until) {
    alignas(64) float high[C], low[C], after[C];
    const float* logs = x.log_decay + (b * x.L + first) * x.H + h;
    double sums[C], sum = 0;
    for (int64_t i = 0; i < C; ++i) {
      if (starts && i < count && starts[i]) sum = 0;
      if (i < count) sum += std::max(logs[i * x.H], LEAST_LOG_DECAY);
      sums[i] = sum, high[i] = float(sum), low[i] = float(sum - high[i]);
    }
    for (int64_t i = 0; i < C; ++i) after[i] = float(sum - sums[i]);
    const ivec lanes = numbers();
    for (int64_t i = 0; i < C; i += W) store(since + i, vexp(load(high + i))), store(until + i, vexp(load(after + i)));
    for (int64_t j = 0; j < up(count, R); ++j) {
      const int64_t from = to_left ? 0 : j / R * R / W * W, stop = to_left ? up(j / R * R + R, W) : C;
      for (int64_t i = from; i < stop; i += W) {
        const vec forward = (load(high + i) - high[j]) + (load(low + i) - low[j]);
        const ivec query = lanes + int32_t(i), seen = to_left ? query <= int32_t(j) : query >= int32_t(j);
        store(pair_decays + j * C + i, seen ? vexp(to_left ? -forward : forward) : vec{});
      }
    }
    return std::exp(sum);
  }

  void pack(const Rows& from, const Chunk& at, float* to, int64_t ld, float factor = 1) const {
    from.of(b, h).pack(at.first, at.count, factor, to, ld);
  }
  void unpack(const Rows& to, const Chunk& at, int64_t ld) const { to.of(b, h).unpack(at.first, at.count, out, ld); }
  // A gradient of q or k: the sum over the heads that share it, at the last of them.
  void unpack_shared(const Rows& to, const Chunk& at, float* sum) const {
    const float* from = out;
    if (to.sharing > 1) {
      const bool first = h % to.sharing == 0;
      for (int64_t n = 0; n < at.count * Kw; n += W) store(sum + n, first ? load(out + n) : load(sum + n) + load(out + n));
      if ((h + 1) % to.sharing) return;
      from = sum;
    }
    to.of(b, h).unpack(at.first, at.count, from, Kw);
  }
  static ivec numbers() {
    ivec lanes{};
    for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
    return lanes;
  }
  static float total(vec x) {
    float sum = 0;
    for (int lane = 0; lane < W; ++lane) sum += x[lane];
    return sum;
  }
  static float dot(const float* a, const float* b, int64_t n) {
    vec products{};
    for (int64_t c = 0; c < n; c += W) products += load(a + c) * load(b + c);
    return total(products);
  }
  float* dlog_decay(const Chunk& at, int64_t i) const { return x.dlog_decay + (b * x.L + at.first + i) * x.H + h; }
  bool ends_span(const Chunk& at) const { return at.first + at.count == x.L || (at.first + at.count) % SPAN == 0; }
  float* at_span(const Chunk& at) const { return head->at_spans + at.first / SPAN * Kw * Vw; }
  float norm(const float* state) const { return std::sqrt(dot(state, state, Kw * Vw)); }
  // Of a token: what `read` gave it of the state, times its own row.
  float state_product(const Chunk& at, int64_t i) const {
    return at.sees_first <= i && i < at.sees_stop ? total(load(state_products + i * W)) : 0;
  }
  // The gradients of log_decay, which hold what passes from the state before the chunk to each token.
  void sum_log_decay_grads(const Chunk& at) {
    const uint8_t* starts = x.document_starts ? x.document_starts + b * x.L + at.first : nullptr;
    if (ends_span(at)) {
      head->passing = 0;
      if (at.sees_stop > at.sees_first)  // else a document begins behind the chunk
        for (int64_t v = 0; v < Vw; ++v) head->passing += dot(at_span(at) + v * Kw, transposed_state + v * Kw, Kw);
    }
    double from_earlier[C], to_later = 0, sum = 0;  // what passes a token to the state after the chunk, from that before
    for (int64_t i = 0; i < at.count; ++i) from_earlier[i] = sum, sum += state_product(at, i);
    // A difference, whose rounding is kept from strong decays by the bound of a scalar product.
    const double bound = 1.001 * at.decay_over_chunk * head->norms[at.first / C] * norm(head->state);
    double between_states = at.cut ? 0 : head->passing - sum;
    if (between_states > bound) between_states = bound;
    if (between_states < -bound) between_states = -bound;
    alignas(64) float to_queries[C] = {};  // of each key, to the token and later ones
    const ivec lanes = numbers();
    for (int64_t i = at.count - 1; i >= 0; --i) {
      vec between_tokens{};
      for (int64_t c = 0; c < i; c += W) {
        const vec sums = load(to_queries + c) + load(pair_products + i * C + c);
        store(to_queries + c, sums);
        between_tokens += lanes + int32_t(c) < int32_t(i) ? sums : vec{};
      }
      float* grad = dlog_decay(at, i);
      to_later += *grad;
      *grad = starts && starts[i] ? 0 : float(total(between_tokens) + to_later + from_earlier[i] + between_states);
    }
    head->passing = starts && starts[0] ? 0 : to_later + between_states;
  }
  void transpose_chunk(const float* from, int64_t ld, const Chunk& at, float* to) const {
    transpose(from, ld, up(at.count, W), ld, to, C);
  }
  void pack_v(const Chunk& at, float* to) const {
    pack(x.v, at, to, Vw);
    if (ones)
      for (int64_t i = 0; i < at.count; ++i) to[i * Vw + x.V] = 1;
  }
  // The gradient of q S.
  void pack_g(const Chunk& at, float* to) {
    pack(x.g, at, to, Vw, ones ? 1 : x.scale);
    if (!ones) return;
    pack(x.y, at, out, Vw);
    for (int64_t i = 0; i < at.count; ++i) {
      const float divisor = x.divisor[(b * x.L + at.first + i) * x.H + h], factor = x.scale / std::max(divisor, x.eps);
      vec products{};
      for (int64_t c = 0; c < Vw; c += W) {
        const vec scaled = load(to + i * Vw + c) * factor;
        products += scaled * load(out + i * Vw + c);
        store(to + i * Vw + c, scaled);
      }
      to[i * Vw + x.V] = divisor < x.eps ? 0 : -total(products);
    }
  }
  void divide(const Chunk& at) {
    for (int64_t i = 0; i < at.count; ++i) {
      // NaN for an infinity, by which quotients would be 0.
      const float sum = out[i * Vw + x.V], divisor = x.divisor[(b * x.L + at.first + i) * x.H + h] = sum + sum * 0;
      for (int64_t c = 0; c < Vw; c += W) store(out + i * Vw + c, load(out + i * Vw + c) / std::max(divisor, x.eps));
    }
  }

  // scores[j, i] = pair_decay_ij (k_j . r_i), with transposed queries. `products` receives the scores before, times
  // k_j . r_i.
  void score(const Chunk& at, const float* keys, int64_t ld, const float* queries, int64_t width, bool to_left,
             float* products = nullptr) {
    const int64_t vectors = up(at.count, W) / W;
    const ivec lanes = numbers();
    for (int64_t j = 0; j < at.count; j += R) {
      const int64_t first = to_left ? 0 : j / W, stop = to_left ? std::min(vectors, up(j + R, W) / W) : vectors;
      tiles(stop - first, [&](int64_t tile, auto n) {
        Tile<n> product;
        const int64_t i = (first + tile) * W;
        ahead.prefetch_some();
        product.add(keys + j * ld, ld, 1, queries + i, C, width);
        auto seen = [&](int64_t key, int64_t query) {
          ivec from, to;
          std::memcpy(&from, at.seen_first + query, sizeof from);
          std::memcpy(&to, at.seen_stop + query, sizeof to);
          const ivec position = lanes + int32_t(query), causal = to_left ? position <= int32_t(key) : position >= int32_t(key);
          return (from <= int32_t(key)) & (int32_t(key) < to) & causal;
        };
        if (products)
          product.each([&](vec& sum, int r, int m) {
            const int64_t place = (j + r) * C + i + m * W;
            const vec pair = sum * load(scores + place);
            store(products + place, !at.cut ? pair : seen(j + r, i + m * W) ? pair : vec{});
          });
        product.each([&](vec& sum, int r, int m) { sum *= load(at.pair_decay + (j + r) * at.pair_step + i + m * W); });
        if (at.cut)
          product.each([&](vec& sum, int r, int m) { sum = seen(j + r, i + m * W) ? sum : vec{}; });
        product.each([&](vec& sum, int r, int m) { store(scores + (j + r) * C + i + m * W, sum); });
      });
    }
  }

  // out_i = state_to_token_i r_i S + sum_j scores_ji v_j. With `owners`, also the products of their rows with those of
  // the first term.
  void read(const Chunk& at, const float* queries, int64_t width, const float* seen, float* values, int64_t ld,
            bool to_left, const float* owners = nullptr) {
    if (at.cut) hide(at, values, ld);
    if (owners) std::memset(state_products, 0, sizeof(float) * C * W);
    tiles(ld / W, [&](int64_t tile, auto n) {
      const int64_t c = tile * W;
      for (int64_t i = 0; i < at.count; i += R) {
        Tile<n> product;
        const int64_t first = to_left ? i : 0, stop = to_left ? at.count : std::min(at.count, i + R);
        ahead.prefetch_some();
        product.add(queries + i, 1, C, seen + c, ld, width);
        if (at.weighted) product.each([&](vec& sum, int r, int) { sum *= at.state_to_token[i + r]; });
        if (at.cut)
          product.each([&](vec& sum, int r, int) {
            if (i + r < at.sees_first || i + r >= at.sees_stop) sum = vec{};
          });
        if (owners)
          product.each([&](vec& sum, int r, int m) {
            float* p = state_products + (i + r) * W;
            store(p, load(p) + sum * load(owners + (i + r) * ld + c + m * W));
          });
        product.add(scores + first * C + i, 1, C, values + first * ld + c, ld, stop - first);
        product.each([&](vec& sum, int r, int m) { store(out + (i + r) * ld + c + m * W, sum); });
      }
    });
    if (at.cut) reveal(at, values, ld, to_left);
  }
  // Sets what is not finite in the rows of values to 0, and keeps these rows.
  void hide(const Chunk& at, float* values, int64_t ld) {
    hidden.clear(), hidden_rows.clear();
    for (int64_t j = 0; j < at.count; ++j) {
      float* row = values + j * ld;
      vec zeros{};
      for (int64_t c = 0; c < ld; c += W) zeros += load(row + c) * 0.0f;
      if (total(zeros) == 0) continue;
      hidden.push_back(j), hidden_rows.insert(hidden_rows.end(), row, row + ld);
      for (int64_t c = 0; c < ld; ++c)
        if (row[c] * 0 != 0) row[c] = 0;
    }
  }
  // Puts the rows back, and NaN in the place of what is not finite in the outputs that see them.
  void reveal(const Chunk& at, float* values, int64_t ld, bool to_left) {
    const float* row = hidden_rows.data();
    for (int64_t j : hidden) {
      for (int64_t i = to_left ? 0 : j; i < (to_left ? j + 1 : at.count); ++i)
        if (at.seen_first[i] <= j && j < at.seen_stop[i])
          for (int64_t c = 0; c < ld; ++c) out[i * ld + c] += row[c] * 0;
      std::copy_n(row, ld, values + j * ld);
      row += ld;
    }
  }

  // S <- decay_over_chunk S + sum_j token_to_state_j k_j^T v_j.
  void update(const Chunk& at, const float* keys, int64_t key_ld, const float* values, int64_t ld) {
    if (head->decays) {
      for (int64_t j = at.tail_first; j < at.tail_stop; ++j)
        for (int64_t c = 0; c < key_ld; c += W)
          store(spare + j * key_ld + c, load(keys + j * key_ld + c) * at.token_to_state[j]);
      keys = spare;
    }
    keys += at.tail_first * key_ld, values += at.tail_first * ld;
    tiles(ld / W, [&](int64_t tile, auto n) {
      const int64_t c = tile * W;
      for (int64_t k = 0; k < key_ld; k += R) {
        Tile<n> product;
        ahead.prefetch_some();
        product.add(keys + k, 1, key_ld, values + c, ld, at.tail_stop - at.tail_first);
        product.each([&](vec& sum, int r, int m) { store(head->state + (k + r) * ld + c + m * W, sum); });
      }
    });
    add_before(at.decay_over_chunk);
  }
  // The state holds the chunk's sums: adds the decayed state before the chunk.
  void add_before(double decay_over_chunk) {
    for (int64_t n = 0; n < Kw * Vw; n += W / 2) {
      half_vec sum;
      half_dvec all{};
      std::memcpy(&sum, head->state + n, sizeof sum);
      if (decay_over_chunk) std::memcpy(&all, head->total + n, sizeof all);
      all = all * decay_over_chunk + __builtin_convertvector(sum, half_dvec);
      sum = __builtin_convertvector(all, half_vec);
      std::memcpy(head->total + n, &all, sizeof all);
      std::memcpy(head->state + n, &sum, sizeof sum);
    }
  }

  const Call& x;
  const bool ones;
  const int64_t Vs, Kw, Vw;  // V with the column of ones; widths in whole vectors
  std::unique_ptr<Line[]> memory;
  float *keys_k, *keys_v;              // [C, K] and [C, V]
  float *transposed_k, *transposed_v;  // [K, C] and [V, C]
  float *spare, *out;                  // [C, K or V]
  float* scores;                       // [C, C], keys by queries
  float* transposed_state;             // [V, K]
  float *group_dq, *group_dk;          // [C, K]
  float* pair_decays;                  // [C, C], keys by queries, of tokens that have decays of their own
  float* pair_products;                // [C, C], likewise: what passes from a key to a query, times the gradient there
  float* state_products;               // [C, W]
  std::vector<int64_t> hidden;         // tokens whose values are not finite
  std::vector<float> hidden_rows;
  std::vector<Head> heads;
  Head* head;  // the current one
  int64_t b, h, first_head, stop_head;
  Ahead ahead;
};

}  // namespace

// Consecutive heads of a task: a thread's share, or fewer so that their states stay in its second-level cache. Whole groups
// of heads that share q and k, or equal parts of a group.
extern "C" int64_t linear_attention_heads(int64_t B, int64_t H, int64_t G, int64_t K, int64_t columns) {
  const int64_t share = up(B * H, omp_get_max_threads()) / omp_get_max_threads(), each = G ? H / G : 1;
  const int64_t fitting = CACHE / (12 * up(K, W) * up(columns, W));
  int64_t heads = std::max<int64_t>(1, std::min({H, share, fitting}));
  if (heads >= each) return heads - heads % each;
  while (each % heads) --heads;
  return heads;
}

// shape: B, L, H, G, K, V, heads of a task. data: q k v g y dq dk dv document_starts initial final_grad final divisor
// decays log_decay dlog_decay, null where not used; strides: of the first eight, over rows, tokens and heads, in bytes;
// half: which of them are bf16. dq and dk have a head for each group, or for each part of it that is a task. Backward,
// final receives the gradient of the initial state.
extern "C" void linear_attention(int gradients, int normalize, const int64_t* shape, void* const* data,
                                 const int64_t* strides, const uint8_t* half, float scale, float eps) {
  auto rows = [&](int n, int64_t width, int64_t sharing) {
    return Rows{(char*)data[n], strides[3 * n], strides[3 * n + 1], strides[3 * n + 2], width, half[n] != 0, sharing};
  };
  const int64_t B = shape[0], L = shape[1], H = shape[2], K = shape[4], V = shape[5], most = shape[6];
  const int64_t sharing = shape[3] ? H / shape[3] : 1, summed = std::min(sharing, most);
  const Call x{B, L, H, K, V, rows(0, K, sharing), rows(1, K, sharing), rows(2, V, 1), rows(3, V, 1), rows(4, V, 1),
               rows(5, K, summed), rows(6, K, summed), rows(7, V, 1), (const uint8_t*)data[8], (const float*)data[9],
               (const float*)data[10], (float*)data[11], (float*)data[12], (const double*)data[13],
               (const float*)data[14], (float*)data[15], normalize != 0, scale, eps, most};
  const int64_t tasks = up(H, most) / most;
#pragma omp parallel if (B * H * (L * (K + V) + K * V) > 1 << 16)
  {
    Heads heads(x);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < B * tasks; ++n) {
      const int64_t b = n / tasks, first = n % tasks * most, stop = std::min(H, first + most);
      if (!gradients) heads.forward(b, first, stop);
      if (gradients && x.dq) heads.left_to_right(b, first, stop);
      if (gradients && (x.dk || x.final)) heads.right_to_left(b, first, stop);
    }
  }
}
