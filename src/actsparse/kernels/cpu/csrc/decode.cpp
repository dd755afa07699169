// One whole token of a Llama-kind decoder, or of several sequences together, without returning to Python.
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
  if (d.heads % d.kv_heads || (d.layers && !d.layer)) return false;
  if (d.cache_dtype < AS_F32 || d.cache_dtype > AS_F16) return false;
  if (!valid_matrix(d.embedding) || d.embedding.layout != AS_ROWS || is_packed(d.embedding) || d.embedding.in != d.hidden) return false;
  if (d.lm_head.data && !valid_shape(d.lm_head, d.lm_head.out, d.hidden)) return false;
  if (d.positions.data && (!valid_matrix(d.positions) || d.positions.layout != AS_ROWS || is_packed(d.positions) ||
                           d.positions.in != d.hidden || d.positions.out < d.cache_length))
    return false;
  if (!(d.attention_scale > 0.0f) || !(d.attention_cap >= 0.0f) || !(d.logit_cap >= 0.0f)) return false;
  const int64_t q_width = d.heads * d.head_dim, kv_width = d.kv_heads * d.head_dim;
  for (int64_t i = 0; i < d.layers; ++i) {
    const as_layer& l = d.layer[i];
    if (!valid_shape(l.q, q_width, d.hidden, l.q_threshold) || !valid_shape(l.k, kv_width, d.hidden, l.k_threshold) ||
        !valid_shape(l.v, kv_width, d.hidden, l.v_threshold) || !valid_shape(l.o, d.hidden, q_width, l.o_threshold) || !l.k_cache || !l.v_cache)
      return false;
    if (l.window < 0 || !l.cosine != !l.sine) return false;
    if (l.cosine && (l.rotary <= 0 || l.rotary % 2 || l.rotary > d.head_dim)) return false;
    if (!valid_ffn(l.ffn) || l.ffn.up.in != d.hidden || l.ffn.down.out != d.hidden) return false;
    if (l.ffn.neurons && l.ffn.neuron_count > 0 &&
        (l.ffn.neurons[0] < 0 || l.ffn.neurons[l.ffn.neuron_count - 1] >= l.ffn.up.out))
      return false;
  }
  return true;
}

void normalise(const as_norm& norm, const float* x, int64_t n, float* y) {
  if (norm.kind != AS_NO_NORM)
    ops().normalise(norm.kind, x, norm.weight, norm.bias, norm.eps, n, y);
  else if (x != y)
    __builtin_memcpy(y, x, size_t(n) * sizeof(float));
}

// One head of q or k under its norm, unless all heads are normalised at once.
void normalise_head(const as_layer& l, const as_norm& norm, int64_t head, int64_t n, float* x) {
  if (norm.kind == AS_NO_NORM || l.heads_norm == AS_ALL_HEADS) return;
  as_norm own = norm;
  if (l.heads_norm == AS_EACH_HEAD) {
    if (own.weight) own.weight += head * n;
    if (own.bias) own.bias += head * n;
  }
  normalise(own, x, n, x);
}

void cap_values(float* x, float scale, float cap, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = cap * __builtin_tanhf(x[i] * scale / cap);
}

void rotate(const as_layer& l, int64_t position, float* head) {
  if (!l.cosine) return;
  const int64_t half = l.rotary / 2;
  const float *cosine = l.cosine + position * half, *sine = l.sine + position * half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

// The sequences of one step, which share their weights: a decoder each for its caches, its newest token and that one's position.
struct Batch {
  const as_decoder* const* decoder;
  const int64_t *token, *position;
  int64_t size;
  // Positions that a layer attends to: `count` from `begin` on.
  int64_t begin(int64_t layer, int64_t b) const {
    const int64_t window = decoder[b]->layer[layer].window, end = position[b] + 1;
    return window && end > window ? end - window : 0;
  }
  int64_t count(int64_t layer, int64_t b) const { return position[b] + 1 - begin(layer, b); }
};

// Rows of vectors [batch, stride]: q [heads, head_dim] becomes the attention output; k and v [kv_heads, head_dim] are appended to
// the caches.
struct Vectors {
  float* at;
  int64_t stride;
  float* row(int64_t b) const { return at + b * stride; }
};

// One key/value head of one sequence.
void attend_head(const as_decoder& d, const as_layer& l, int64_t position, int64_t begin, int64_t count, int64_t h, float* q,
                 float* k, const float* v, float* out, float* scores) {
  const IsaOps& isa = ops();
  const int64_t group = d.heads / d.kv_heads, size = element_size(d.cache_dtype), score_stride = padded(count);
  char* const keys = static_cast<char*>(l.k_cache) + h * d.cache_length * d.head_dim * size;
  char* const values = static_cast<char*>(l.v_cache) + h * d.cache_length * d.head_dim * size;
  float* const key = k + h * d.head_dim;
  const float scale = d.attention_scale * (d.query_scale ? d.query_scale[position] : 1.0f);
  normalise_head(l, l.k_norm, h, d.head_dim, key);
  rotate(l, position, key);
  isa.narrow(d.cache_dtype, key, keys + position * d.head_dim * size, d.head_dim);
  isa.narrow(d.cache_dtype, v + h * d.head_dim, values + position * d.head_dim * size, d.head_dim);
  for (int64_t first = 0; first < group; first += AS_MAX_BATCH) {
    const int64_t n = group - first < AS_MAX_BATCH ? group - first : AS_MAX_BATCH;
    float* const query = q + (h * group + first) * d.head_dim;
    float* const result = out + (h * group + first) * d.head_dim;
    for (int64_t i = 0; i < n; ++i) {
      float* const head = query + i * d.head_dim;
      normalise_head(l, l.q_norm, h * group + first + i, d.head_dim, head);
      rotate(l, position, head);
      isa.arrange(d.cache_dtype, head, d.head_dim);
    }
    isa.dot_rows(d.cache_dtype, keys, d.head_dim, nullptr, begin, count, query, d.head_dim, n, d.head_dim, scores, score_stride);
    for (int64_t i = 0; i < n; ++i) {
      float* const row = scores + i * score_stride;
      if (d.attention_cap > 0.0f) cap_values(row, scale, d.attention_cap, count);
      isa.softmax(row, d.attention_cap > 0.0f ? 1.0f : scale, count);
    }
    isa.add_rows(d.cache_dtype, values, d.head_dim, nullptr, begin, count, scores, score_stride, n, d.head_dim, result,
                 d.head_dim, true);
  }
}

void attend(const Batch& batch, int64_t layer, Vectors q, Vectors k, Vectors v, Vectors out) {
  const as_decoder& d = *batch.decoder[0];
  const int64_t heads = batch.size * d.kv_heads;
  int64_t positions = 0, most = 0;
  for (int64_t b = 0; b < batch.size; ++b) {
    const int64_t count = batch.count(layer, b);
    positions += count;
    most = count > most ? count : most;
  }
  // Four times what is read, and the cost of some KB for a head: every head computes on top of that.
  constexpr int64_t head_bytes = 64 * 1024;
  int64_t tasks = tasks_for(8 * d.kv_heads * positions * d.head_dim * element_size(d.cache_dtype) + heads * head_bytes);
  if (tasks > heads) tasks = heads;
  const int64_t room = AS_MAX_BATCH * padded(most);
  float* const scores = arena().take<float>(tasks * room);
  parallel(tasks, [&](int64_t task) {
    const Slice s = slice_of(heads, task, tasks);
    for (int64_t i = s.begin; i < s.end; ++i) {
      const int64_t b = i / d.kv_heads;
      attend_head(*batch.decoder[b], batch.decoder[b]->layer[layer], batch.position[b], batch.begin(layer, b),
                  batch.count(layer, b), i % d.kv_heads, q.row(b), k.row(b), v.row(b), out.row(b), scores + task * room);
    }
  });
}

Vectors take_vectors(int64_t batch, int64_t width) { return {arena().take<float>(batch * padded(width)), padded(width)}; }

void normalise(const as_norm& norm, Vectors x, int64_t batch, int64_t n, Vectors y) {
  for (int64_t b = 0; b < batch; ++b) normalise(norm, x.row(b), n, y.row(b));
}

void add_scaled(Vectors h, Vectors block, int64_t batch, float scale, int64_t n) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) h.row(b)[i] += scale * block.row(b)[i];
}

// logits [batch, vocabulary]. What layer n reads is added to stats[n * stats_stride], what the head reads to the one after them.
void decode(const Batch& batch, float* logits, as_stats* stats, int64_t stats_stride) {
  const IsaOps& isa = ops();
  Arena& scratch = arena();
  const as_decoder& d = *batch.decoder[0];
  const int64_t rows = batch.size, q_width = d.heads * d.head_dim, kv_width = d.kv_heads * d.head_dim;
  const Vectors h = take_vectors(rows, d.hidden);  // the residual streams
  const Vectors x = take_vectors(rows, d.hidden), block = take_vectors(rows, d.hidden);
  const Vectors q = take_vectors(rows, q_width), attention = take_vectors(rows, q_width);
  const Vectors k = take_vectors(rows, kv_width), v = take_vectors(rows, kv_width);

  for (int64_t b = 0; b < rows; ++b) {
    float* const to = h.row(b);
    isa.widen(d.embedding.dtype, stored_at(d.embedding, batch.token[b]), to, d.hidden);
    for (int64_t i = 0; i < d.hidden; ++i) to[i] *= d.embedding_scale;
    if (!d.positions.data) continue;
    isa.widen(d.positions.dtype, stored_at(d.positions, batch.position[b]), x.row(b), d.hidden);
    for (int64_t i = 0; i < d.hidden; ++i) to[i] += x.row(b)[i];
  }
  const int64_t runs = padded(d.hidden / Stream::run);  // whole sixteens of them
  const Stream stream = {h.at, h.stride, d.hidden, scratch.take<double>(rows * runs), runs};
  const auto measure = [&] {
    for (int64_t b = 0; b < rows; ++b) stream.measure(b, 0, d.hidden);
  };
  measure();
  for (int64_t n = 0; n < d.layers; ++n, stats += stats ? stats_stride : 0) {
    const as_layer& l = d.layer[n];
    const size_t mark = scratch.mark();
    const bool apart = !l.parallel;  // else one norm's values serve both blocks
    const bool normed = apart && l.input_norm.kind == AS_RMS_NORM && !l.input_norm.bias && is_packed(l.q) && is_packed(l.k) && is_packed(l.v);
    if (!normed) normalise(l.input_norm, h, rows, d.hidden, x);
    Product qkv[3] = {prepare(l.q, l.q_threshold, x.at, x.stride, rows, q.at, q.stride),
                      prepare(l.k, l.k_threshold, x.at, x.stride, rows, k.at, k.stride),
                      prepare(l.v, l.v_threshold, x.at, x.stride, rows, v.at, v.stride)};
    for (Product& p : qkv) {
      p.norm = normed ? &l.input_norm : nullptr;
      p.stream = &stream;
    }
    run(qkv, 3, rows, stats);
    if (l.heads_norm == AS_ALL_HEADS) {
      normalise(l.q_norm, q, rows, q_width, q);
      normalise(l.k_norm, k, rows, kv_width, k);
    }
    attend(batch, n, q, k, v, attention);
    Product o = prepare(l.o, l.o_threshold, attention.at, attention.stride, rows, block.at, block.stride);
    const bool o_joins = is_packed(l.o) && l.attention_out_norm.kind == AS_NO_NORM;
    o.onto = o_joins ? &stream : nullptr;
    o.onto_scale = d.residual_scale;
    run(&o, 1, rows, stats);
    if (!o_joins) {
      normalise(l.attention_out_norm, block, rows, d.hidden, block);
      add_scaled(h, block, rows, d.residual_scale, d.hidden);
      measure();
    }
    const bool ffn_packed = is_packed(l.ffn.up), ffn_joins = ffn_packed && l.ffn_out_norm.kind == AS_NO_NORM;
    const bool ffn_normed = apart && ffn_packed && l.post_norm.kind == AS_RMS_NORM && !l.post_norm.bias;
    if (apart && !ffn_normed) normalise(l.post_norm, h, rows, d.hidden, x);
    if (ffn_packed)
      packed_ffn(l.ffn, x.at, x.stride, block.at, block.stride, rows, stats, ffn_normed ? &l.post_norm : nullptr, &stream,
                 ffn_joins, d.residual_scale);
    else
      ffn(l.ffn, x.at, x.stride, block.at, block.stride, rows, stats);
    if (!ffn_joins) {
      normalise(l.ffn_out_norm, block, rows, d.hidden, block);
      add_scaled(h, block, rows, d.residual_scale, d.hidden);
      measure();
    }
    scratch.release(mark);
  }
  normalise(d.final_norm, h, rows, d.hidden, x);
  const as_matrix& head = d.lm_head.data ? d.lm_head : d.embedding;
  Product p = prepare(head, nullptr, x.at, x.stride, rows, logits, head.out);
  run(&p, 1, rows, stats);
  if (d.logit_scale != 1.0f)
    for (int64_t i = 0; i < rows * head.out; ++i) logits[i] *= d.logit_scale;
  if (d.logit_cap > 0.0f) cap_values(logits, 1.0f, d.logit_cap, rows * head.out);
}

bool same(const as_matrix& v, const as_matrix& w) {
  if (!is_packed(v) || !is_packed(w)) return v.data == w.data;
  return static_cast<const as_packed*>(v.data)->plane == static_cast<const as_packed*>(w.data)->plane;
}

// Whether two decoders multiply with the same weights (the rules are the first one's) and have caches of their own. Chosen neurons
// belong to one text: two that have any never go together.
bool alike(const as_decoder& a, const as_decoder& b) {
  if (a.layers != b.layers || a.hidden != b.hidden || a.heads != b.heads || a.kv_heads != b.kv_heads || a.head_dim != b.head_dim ||
      a.cache_dtype != b.cache_dtype || !same(a.embedding, b.embedding) || !same(a.lm_head, b.lm_head))
    return false;
  for (int64_t n = 0; n < a.layers; ++n) {
    const as_layer &l = a.layer[n], &m = b.layer[n];
    if (l.window != m.window || !same(l.q, m.q) || !same(l.k, m.k) || !same(l.v, m.v) || !same(l.o, m.o) ||
        !same(l.ffn.gate, m.ffn.gate) || !same(l.ffn.up, m.ffn.up) || !same(l.ffn.down, m.ffn.down) ||
        l.ffn.neurons || m.ffn.neurons || l.k_cache == m.k_cache || l.v_cache == m.v_cache)
      return false;
  }
  return true;
}

int32_t step(const Batch& batch, float* logits, as_stats* stats, int64_t stats_stride) {
  if (!batch.decoder || !batch.token || !batch.position || !logits || batch.size < 1 || batch.size > AS_MAX_BATCH) return AS_EINVAL;
  for (int64_t b = 0; b < batch.size; ++b) {
    const as_decoder* const d = batch.decoder[b];
    if (!d || !valid_decoder(*d)) return AS_EINVAL;
    if (batch.token[b] < 0 || batch.token[b] >= d->embedding.out || batch.position[b] < 0 || batch.position[b] >= d->cache_length)
      return AS_EINVAL;
    for (int64_t other = 0; other < b; ++other)
      if (!alike(*batch.decoder[other], *d)) return AS_EINVAL;
  }
  try {
    as_a_team([&] {
      arena().reset();
      decode(batch, logits, stats, stats_stride);
    });
  } catch (const std::bad_alloc&) {
    return AS_ENOMEM;
  }
  return AS_OK;
}

}  // namespace
}  // namespace actsparse

using namespace actsparse;

int32_t as_decode_step(const as_decoder* decoder, int64_t token, int64_t position, float* logits, as_stats* stats) {
  return step({&decoder, &token, &position, 1}, logits, stats, 0);
}

int32_t as_decode_together(const as_decoder* const* decoders, const int64_t* tokens, const int64_t* positions, int64_t batch,
                           float* logits, as_stats* stats) {
  return step({decoders, tokens, positions, batch}, logits, stats, 1);
}
