// One whole token of a Llama-kind decoder without returning to Python.
#include <new>

#include "internal.h"

namespace actsparse {
namespace {

bool valid_shape(const as_matrix& w, int64_t out, int64_t in, const float* threshold = nullptr) {
  return valid_matrix(w) && w.out == out && w.in == in && !(threshold && is_packed(w));
}

bool valid_decoder(const as_decoder& d) {
  if (d.layers < 0 || d.hidden <= 0 || d.heads <= 0 || d.kv_heads <= 0 || d.head_dim <= 0 || d.cache_length <= 0)
    return false;
  if (d.heads % d.kv_heads || d.window < 0 || (d.layers && !d.layer) || !d.cosine != !d.sine) return false;
  if ((d.cosine && d.head_dim % 2) || d.cache_dtype < AS_F32 || d.cache_dtype > AS_F16) return false;
  if (!valid_matrix(d.embedding) || d.embedding.layout != AS_ROWS || is_packed(d.embedding) || d.embedding.in != d.hidden) return false;
  if (d.lm_head.data && !valid_shape(d.lm_head, d.lm_head.out, d.hidden)) return false;
  if (!(d.attention_scale > 0.0f)) return false;
  const int64_t q_width = d.heads * d.head_dim, kv_width = d.kv_heads * d.head_dim;
  for (int64_t i = 0; i < d.layers; ++i) {
    const as_layer& l = d.layer[i];
    if (!valid_shape(l.q, q_width, d.hidden, l.q_threshold) || !valid_shape(l.k, kv_width, d.hidden, l.k_threshold) ||
        !valid_shape(l.v, kv_width, d.hidden, l.v_threshold) || !valid_shape(l.o, d.hidden, q_width, l.o_threshold) || !l.k_cache || !l.v_cache)
      return false;
    if (!valid_ffn(l.ffn) || l.ffn.up.in != d.hidden || l.ffn.down.out != d.hidden) return false;
    if (l.ffn.neurons && l.ffn.neuron_count > 0 &&
        (l.ffn.neurons[0] < 0 || l.ffn.neurons[l.ffn.neuron_count - 1] >= l.ffn.up.out))
      return false;
  }
  return true;
}

void normalise(const as_norm& norm, const float* x, int64_t n, float* y) {
  ops().normalise(norm.kind, x, norm.weight, norm.bias, norm.eps, n, y);
}

void rotate(const as_decoder& d, int64_t position, float* head) {
  if (!d.cosine) return;
  const int64_t half = d.head_dim / 2;
  const float *cosine = d.cosine + position * half, *sine = d.sine + position * half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

// q [heads, head_dim] becomes the attention output; k and v [kv_heads, head_dim] are appended to the caches.
void attend(const as_decoder& d, const as_layer& l, int64_t position, float* q, float* k, const float* v, float* out) {
  const IsaOps& isa = ops();
  const int64_t group = d.heads / d.kv_heads, size = element_size(d.cache_dtype);
  const int64_t begin = d.window && position + 1 > d.window ? position + 1 - d.window : 0, count = position + 1 - begin;
  const int64_t score_stride = padded(count);
  const int64_t cache_bytes = 2 * d.kv_heads * count * d.head_dim * size;
  int64_t tasks = tasks_for(cache_bytes);
  if (tasks > d.kv_heads) tasks = d.kv_heads;
  float* const all_scores = arena().take<float>(tasks * AS_MAX_BATCH * score_stride);

  parallel(tasks, [&](int64_t task) {
    float* const scores = all_scores + task * AS_MAX_BATCH * score_stride;
    const Slice s = slice_of(d.kv_heads, task, tasks);
    for (int64_t h = s.begin; h < s.end; ++h) {
      char* const keys = static_cast<char*>(l.k_cache) + h * d.cache_length * d.head_dim * size;
      char* const values = static_cast<char*>(l.v_cache) + h * d.cache_length * d.head_dim * size;
      float* const key = k + h * d.head_dim;
      if (l.k_norm.weight) normalise(l.k_norm, key, d.head_dim, key);
      rotate(d, position, key);
      isa.narrow(d.cache_dtype, key, keys + position * d.head_dim * size, d.head_dim);
      isa.narrow(d.cache_dtype, v + h * d.head_dim, values + position * d.head_dim * size, d.head_dim);
      for (int64_t first = 0; first < group; first += AS_MAX_BATCH) {
        const int64_t n = group - first < AS_MAX_BATCH ? group - first : AS_MAX_BATCH;
        float* const query = q + (h * group + first) * d.head_dim;
        float* const result = out + (h * group + first) * d.head_dim;
        for (int64_t i = 0; i < n; ++i) {
          float* const head = query + i * d.head_dim;
          if (l.q_norm.weight) normalise(l.q_norm, head, d.head_dim, head);
          rotate(d, position, head);
          isa.arrange(d.cache_dtype, head, d.head_dim);
        }
        isa.dot_rows(d.cache_dtype, keys, d.head_dim, nullptr, begin, count, query, d.head_dim, n, d.head_dim, scores,
                     score_stride);
        for (int64_t i = 0; i < n; ++i) isa.softmax(scores + i * score_stride, d.attention_scale, count);
        isa.add_rows(d.cache_dtype, values, d.head_dim, nullptr, begin, count, scores, score_stride, n, d.head_dim,
                     result, d.head_dim, true);
      }
    }
  });
}

void add_scaled(float* h, const float* block, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) h[i] += scale * block[i];
}

void decode(const as_decoder& d, int64_t token, int64_t position, float* logits, as_stats* stats) {
  const IsaOps& isa = ops();
  Arena& scratch = arena();
  const int64_t q_width = d.heads * d.head_dim, kv_width = d.kv_heads * d.head_dim;
  float* const h = scratch.take<float>(d.hidden);  // the residual stream
  float* const x = scratch.take<float>(d.hidden);
  float* const block = scratch.take<float>(padded(d.hidden));
  float* const q = scratch.take<float>(padded(q_width));
  float* const k = scratch.take<float>(padded(kv_width));
  float* const v = scratch.take<float>(padded(kv_width));
  float* const attention = scratch.take<float>(q_width);

  isa.widen(d.embedding.dtype, stored_at(d.embedding, token), h, d.hidden);
  for (int64_t i = 0; i < d.hidden; ++i) h[i] *= d.embedding_scale;
  for (int64_t n = 0; n < d.layers; ++n) {
    const as_layer& l = d.layer[n];
    const size_t mark = scratch.mark();
    normalise(l.input_norm, h, d.hidden, x);
    Product qkv[3] = {prepare(l.q, l.q_threshold, x, d.hidden, 1, q, padded(q_width)),
                      prepare(l.k, l.k_threshold, x, d.hidden, 1, k, padded(kv_width)),
                      prepare(l.v, l.v_threshold, x, d.hidden, 1, v, padded(kv_width))};
    run(qkv, 3, 1, stats);
    attend(d, l, position, q, k, v, attention);
    Product o = prepare(l.o, l.o_threshold, attention, q_width, 1, block, padded(d.hidden));
    run(&o, 1, 1, stats);
    add_scaled(h, block, d.residual_scale, d.hidden);
    normalise(l.post_norm, h, d.hidden, x);
    ffn(l.ffn, x, d.hidden, block, padded(d.hidden), 1, stats);
    add_scaled(h, block, d.residual_scale, d.hidden);
    scratch.release(mark);
  }
  normalise(d.final_norm, h, d.hidden, x);
  const as_matrix& head = d.lm_head.data ? d.lm_head : d.embedding;
  Product p = prepare(head, nullptr, x, d.hidden, 1, logits, head.out);
  run(&p, 1, 1, stats);
  if (d.logit_scale != 1.0f)
    for (int64_t i = 0; i < head.out; ++i) logits[i] *= d.logit_scale;
}

}  // namespace
}  // namespace actsparse

using namespace actsparse;

int32_t as_decode_step(const as_decoder* decoder, int64_t token, int64_t position, float* logits, as_stats* stats) {
  if (!decoder || !logits || !valid_decoder(*decoder)) return AS_EINVAL;
  if (token < 0 || token >= decoder->embedding.out || position < 0 || position >= decoder->cache_length) return AS_EINVAL;
  try {
    arena().reset();
    decode(*decoder, token, position, logits, stats);
  } catch (const std::bad_alloc&) {
    return AS_ENOMEM;
  }
  return AS_OK;
}
