// The two multiplications: kept columns accumulated, kept rows dotted.
#include <chrono>
#include <new>

#include "internal.h"

namespace actsparse {

bool valid_matrix(const as_matrix& w) {
  if (!w.data || w.out <= 0 || w.in <= 0 || w.out > INT32_MAX || w.in > INT32_MAX) return false;
  if (w.dtype == AS_PACKED) return valid_packed(w);
  if (w.dtype < AS_F32 || w.dtype > AS_F16 || (w.layout != AS_ROWS && w.layout != AS_COLUMNS)) return false;
  return stored_count(w) == 1 || w.stride >= stored_length(w);
}

namespace {

int64_t now() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Stopwatch::Stopwatch(as_stats* stats) : stats_(stats) {
  if (stats_) begin_ = now();
}

Stopwatch::~Stopwatch() {
  if (stats_) __atomic_fetch_add(&stats_->product_ns, now() - begin_, __ATOMIC_RELAXED);
}

void count_rows(as_stats* stats, int64_t gate, int64_t up, int64_t down, int64_t bytes) {
  if (!stats) return;
  // Several Python threads may share one struct.
  if (gate) __atomic_fetch_add(&stats->gate_rows, gate, __ATOMIC_RELAXED);
  if (up) __atomic_fetch_add(&stats->up_rows, up, __ATOMIC_RELAXED);
  if (down) __atomic_fetch_add(&stats->down_rows, down, __ATOMIC_RELAXED);
  if (bytes) __atomic_fetch_add(&stats->bytes, bytes, __ATOMIC_RELAXED);
}

void count_packed(as_stats* stats, int64_t planes, int64_t weights, int64_t bytes) {
  if (!stats) return;
  __atomic_fetch_add(&stats->packed_planes, planes, __ATOMIC_RELAXED);
  __atomic_fetch_add(&stats->packed_weights, weights, __ATOMIC_RELAXED);
  __atomic_fetch_add(&stats->bytes, bytes, __ATOMIC_RELAXED);
}

Product prepare(const as_matrix& w, const float* threshold, const Activations& x, int64_t batch, float* out,
                int64_t out_stride, const int32_t* rows, int64_t row_count) {
  Product p;
  p.w = &w;
  p.isa = &ops();
  if (batch > 1 && w.dtype == AS_BF16 && x.raw && x.raw_dtype == AS_BF16) p.pairs = batch_ops();
  p.x = x;
  p.out = out;
  p.out_stride = out_stride;
  p.count = w.layout == AS_ROWS && rows ? row_count : stored_count(w);
  if (w.layout == AS_COLUMNS && threshold) {
    p.threshold = threshold;
    return p;
  }
  if (w.layout == AS_ROWS) {
    p.mask = threshold;
    p.rows = rows;
    return p;
  }
  p.x.widen(*p.isa, batch, w.in, 0, w.in);
  p.x.raw = nullptr;
  return p;
}

void Product::make_room(int64_t tasks, int64_t batch) { arranged = arena().take<float>(tasks * batch * padded(w->in)); }

const uint16_t* Product::masked_pairs(int64_t task, int64_t batch) const {
  const int64_t n = w->in;
  uint16_t* const copy = reinterpret_cast<uint16_t*>(arranged + task * batch * padded(n));
  for (int64_t b = 0; b < batch; ++b) {
    const uint16_t* const from = static_cast<const uint16_t*>(x.raw) + b * n;
    uint16_t* const row = copy + b * pairs_stride();
    if (!mask) {
      __builtin_memcpy(row, from, size_t(n) * sizeof(uint16_t));
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = uint32_t(from[i] & 0x7fffu) << 16;
      float magnitude;
      __builtin_memcpy(&magnitude, &bits, 4);
      row[i] = magnitude < mask[i] ? uint16_t(0) : from[i];
    }
  }
  return copy;
}

const float* Product::arrange(int64_t task, int64_t batch) const {
  const int64_t n = w->in;
  float* const copy = arranged + task * batch * padded(n);
  Activations own = x;
  own.x = copy;
  own.stride = padded(n);
  own.widen(*isa, batch, n, 0, n);
  for (int64_t b = 0; b < batch; ++b) {
    float* const row = copy + b * own.stride;
    if (!x.raw) __builtin_memcpy(row, x.x + b * x.stride, size_t(n) * sizeof(float));
    if (mask)
      for (int64_t i = 0; i < n; ++i) row[i] = __builtin_fabsf(row[i]) < mask[i] ? 0.0f : row[i];
    isa->arrange(w->dtype, row, n);
  }
  return copy;
}

Sums::Sums(const Segments& segments, const as_matrix& w, int64_t batch, float* out, int64_t out_stride)
    : w_(&w), batch_(batch), out_stride_(out_stride), stride_(padded(w.out)), segments_(segments.number()), out_(out) {
  rooms_ = arena().take<float>((segments_ - 1) * batch * stride_);
  filled_ = arena().take<bool>(segments_);
}

void Sums::add(const IsaOps& isa, int64_t segment, int64_t first, int64_t count, const int32_t* columns,
               const float* coefficients, int64_t coefficient_stride, const BatchOps* pairs) const {
  filled_[segment] = count > 0;
  if (segment && count == 0) return;
  float* const acc = segment ? rooms_ + (segment - 1) * batch_ * stride_ : out_;
  const int64_t stride = segment ? stride_ : out_stride_;
  const bool fresh = segment || !w_->bias;
  for (int64_t b = 0; !fresh && b < batch_; ++b)
    __builtin_memcpy(acc + b * stride, w_->bias, size_t(w_->out) * sizeof(float));
  if (pairs)
    pairs->add_rows(w_->data, w_->stride, columns, first, count, coefficients, coefficient_stride, batch_, w_->out, acc, stride,
                    fresh);
  else
    isa.add_rows(w_->dtype, w_->data, w_->stride, columns, first, count, coefficients, coefficient_stride, batch_, w_->out,
                 acc, stride, fresh);
}

void Sums::finish() const {
  if (segments_ == 1) return;
  // Lines that other cores have just written come slower than a stream from memory: fewer bytes are worth a thread.
  constexpr int64_t dearer = 8;
  const int64_t n = w_->out, reducers = tasks_for(dearer * (segments_ - 1) * batch_ * n * int64_t(sizeof(float)));
  parallel(reducers, [&](int64_t task) {
    const Slice lines = slice_of((n + 15) / 16, task, reducers);  // no two tasks write to one
    const int64_t end = lines.end * 16 < n ? lines.end * 16 : n;
    for (int64_t b = 0; b < batch_; ++b)
      for (int64_t k = 1; k < segments_; ++k) {
        if (!filled_[k]) continue;
        const float* const from = rooms_ + ((k - 1) * batch_ + b) * stride_;
        float* const to = out_ + b * out_stride_;
        for (int64_t o = lines.begin * 16; o < end; ++o) to[o] += from[o];
      }
  });
}

namespace {

void rows_of(const Product& p, const void* x, Slice s, int64_t batch) {
  const as_matrix& w = *p.w;
  const int32_t* const idx = p.rows ? p.rows + s.begin : nullptr;
  if (p.pairs)
    p.pairs->dot_rows(w.data, w.stride, idx, s.begin, s.size(), static_cast<const uint16_t*>(x), p.pairs_stride(), batch,
                      w.in, p.out + s.begin, p.out_stride);
  else
    p.isa->dot_rows(w.dtype, w.data, w.stride, idx, s.begin, s.size(), static_cast<const float*>(x), padded(w.in), batch,
                    w.in, p.out + s.begin, p.out_stride);
  for (int64_t b = 0; b < batch; ++b) {
    float* const out = p.out + b * p.out_stride;
    if (w.bias)
      for (int64_t j = s.begin; j < s.end; ++j) out[j] += w.bias[p.rows ? p.rows[j] : j];
    if (p.activation != no_activation) p.isa->activate(p.activation, out + s.begin, s.size());
  }
}

void columns_of(const Product& p, Slice s, int64_t segment) {
  if (!p.threshold) return p.sums.add(*p.isa, segment, s.begin, s.size(), nullptr, p.x.x + s.begin, p.x.stride, p.pairs);
  const KeptList kept = p.found.find(segment, s);
  p.sums.add(*p.isa, segment, 0, kept.count, kept.positions, kept.values, kept.stride, p.pairs);
}

}  // namespace

void run(Product* products, int64_t count, int64_t batch, as_stats* stats) {
  Product* packed[3];
  int64_t packed_count = 0;
  for (int64_t k = 0; k < count; ++k)
    if (is_packed(*products[k].w)) packed[packed_count++] = products + k;
  if (packed_count) {
    run_packed(packed, packed_count, batch, stats);
    for (int64_t k = 0; k < count; ++k)  // those beside packed ones are rare enough for a region each
      if (packed_count < count && !is_packed(*products[k].w)) run(products + k, 1, batch, stats);
    return;
  }
  const Stopwatch watch(stats);
  int64_t most = 0;
  for (int64_t k = 0; k < count; ++k) most += products[k].bytes();
  const int64_t tasks = tasks_for(most);
  for (Product* p = products; p < products + count; ++p) {
    // Sums of further segments would have to be fetched from other cores, which takes what the finer cut gains.
    p->segments = Segments(tasks, p->w->layout == AS_ROWS);
    if (p->w->layout == AS_ROWS) p->make_room(tasks, batch);
    if (p->w->layout == AS_COLUMNS) p->sums = Sums(p->segments, *p->w, batch, p->out, p->out_stride);
    if (p->threshold) p->found = Kept(*p->isa, p->x, p->threshold, batch, p->w->in, p->segments.number(), true, p->pairs);
  }

  parallel(tasks, [&](int64_t task) {
    for (const Product* p = products; p < products + count; ++p) {
      const void* x = nullptr;
      if (p->arranged && p->pairs)
        x = p->masked_pairs(task, batch);
      else if (p->arranged)
        x = p->arrange(task, batch);
      p->segments.each(task, [&](int64_t segment) {
        const Slice s = p->segments.slice(p->count, segment);
        if (p->w->layout == AS_ROWS)
          rows_of(*p, x, s, batch);
        else
          columns_of(*p, s, segment);
      });
    }
  });

  int64_t bytes = 0;
  for (Product* p = products; p < products + count; ++p) {
    if (p->threshold) p->count = p->found.count();
    if (p->w->layout == AS_COLUMNS) p->sums.finish();
    bytes += p->bytes();
  }
  count_rows(stats, 0, 0, 0, bytes);
}

}  // namespace actsparse

using namespace actsparse;

namespace {

// A view of the caller's activations, with room for them in float32 where they have another type.
Activations activations_of(const void* x, int64_t batch, int64_t n, int32_t dtype) {
  Activations a;
  a.stride = n;
  if (dtype == AS_F32) {
    a.x = static_cast<float*>(const_cast<void*>(x));
    return a;
  }
  a.stride = padded(n);
  a.x = arena().take<float>(batch * a.stride);
  a.raw = x;
  a.raw_dtype = dtype;
  return a;
}

void narrowed(const float* y, int64_t y_stride, void* out, int64_t batch, int64_t n, int32_t dtype) {
  for (int64_t b = 0; b < batch; ++b)
    ops().narrow(dtype, y + b * y_stride, static_cast<char*>(out) + b * n * element_size(dtype), n);
}

bool valid_call(const void* x, const void* y, int64_t batch, int32_t io_dtype) {
  return x && y && batch >= 1 && batch <= AS_MAX_BATCH && io_dtype >= AS_F32 && io_dtype <= AS_F16;
}

// Ascending and inside [0, limit): one vectorisable pass, because a wrong index would read outside the weights.
bool valid_list(const int32_t* list, int64_t count, int64_t limit) {
  if (count < 0 || count > limit) return false;
  int32_t wrong = 0;
  for (int64_t i = 1; i < count; ++i) wrong |= list[i] <= list[i - 1];
  return !wrong && (count == 0 || (list[0] >= 0 && list[count - 1] < limit));
}

}  // namespace

int32_t as_linear(const as_matrix* w, const float* threshold, const void* x, void* y, int64_t batch, int32_t io_dtype,
                  as_stats* stats) {
  if (!w || !valid_matrix(*w) || !valid_call(x, y, batch, io_dtype) || (threshold && is_packed(*w))) return AS_EINVAL;
  try {
    arena().reset();
    const int64_t y_stride = padded(w->out);
    float* const yf = arena().take<float>(batch * y_stride);
    Product p = prepare(*w, threshold, activations_of(x, batch, w->in, io_dtype), batch, yf, y_stride);
    run(&p, 1, batch, stats);
    narrowed(yf, y_stride, y, batch, w->out, io_dtype);
  } catch (const std::bad_alloc&) {
    return AS_ENOMEM;
  }
  return AS_OK;
}

int32_t as_linear_rows(const as_matrix* w, const int32_t* rows, int64_t row_count, const void* x, void* y, int64_t batch,
                       int32_t io_dtype, as_stats* stats) {
  if (!w || !valid_matrix(*w) || w->layout != AS_ROWS || !valid_call(x, y, batch, io_dtype)) return AS_EINVAL;
  if ((!rows && row_count) || !valid_list(rows, row_count, w->out)) return AS_EINVAL;
  if (row_count == 0) return AS_OK;
  try {
    arena().reset();
    const int64_t y_stride = padded(row_count);
    float* const yf = arena().take<float>(batch * y_stride);
    Product p = prepare(*w, nullptr, activations_of(x, batch, w->in, io_dtype), batch, yf, y_stride, rows, row_count);
    run(&p, 1, batch, stats);
    const int64_t size = element_size(io_dtype);
    char* const narrow = arena().take<char>(row_count * size);
    for (int64_t b = 0; b < batch; ++b) {
      ops().narrow(io_dtype, yf + b * y_stride, narrow, row_count);
      char* const to = static_cast<char*>(y) + b * w->out * size;
      for (int64_t j = 0; j < row_count; ++j) __builtin_memcpy(to + rows[j] * size, narrow + j * size, size_t(size));
    }
  } catch (const std::bad_alloc&) {
    return AS_ENOMEM;
  }
  return AS_OK;
}

int32_t as_ffn_forward(const as_ffn* f, const void* x, void* y, int64_t batch, int32_t io_dtype, as_stats* stats) {
  if (!f || !valid_ffn(*f) || !valid_call(x, y, batch, io_dtype)) return AS_EINVAL;
  if (f->neurons && !valid_list(f->neurons, f->neuron_count, f->up.out)) return AS_EINVAL;
  try {
    arena().reset();
    const Activations a = activations_of(x, batch, f->up.in, io_dtype);
    a.widen(ops(), batch, f->up.in, 0, f->up.in);
    const int64_t y_stride = padded(f->down.out);
    float* const yf = arena().take<float>(batch * y_stride);
    ffn(*f, a.x, a.stride, yf, y_stride, batch, stats);
    narrowed(yf, y_stride, y, batch, f->down.out, io_dtype);
  } catch (const std::bad_alloc&) {
    return AS_ENOMEM;
  }
  return AS_OK;
}
