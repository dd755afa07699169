// The two multiplications: kept columns accumulated, kept rows dotted.
#include <new>

#include "internal.h"

namespace actsparse {

bool valid_matrix(const as_matrix& w) {
  if (!w.data || w.out <= 0 || w.in <= 0 || w.out > INT32_MAX || w.in > INT32_MAX) return false;
  if (w.dtype < AS_F32 || w.dtype > AS_F16 || (w.layout != AS_ROWS && w.layout != AS_COLUMNS)) return false;
  return stored_count(w) == 1 || w.stride >= stored_length(w);
}

void count_rows(as_stats* stats, int64_t gate, int64_t up, int64_t down, int64_t bytes) {
  if (!stats) return;
  // Several Python threads may share one struct.
  if (gate) __atomic_fetch_add(&stats->gate_rows, gate, __ATOMIC_RELAXED);
  if (up) __atomic_fetch_add(&stats->up_rows, up, __ATOMIC_RELAXED);
  if (down) __atomic_fetch_add(&stats->down_rows, down, __ATOMIC_RELAXED);
  if (bytes) __atomic_fetch_add(&stats->bytes, bytes, __ATOMIC_RELAXED);
}

Product prepare(const as_matrix& w, const float* threshold, const float* x, int64_t x_stride, int64_t batch, float* out,
                int64_t out_stride, const int32_t* rows, int64_t row_count) {
  Product p;
  p.w = &w;
  p.isa = &ops();
  p.x = x;
  p.x_stride = x_stride;
  p.out = out;
  p.out_stride = out_stride;
  const bool by_rows = w.layout == AS_ROWS;
  p.kept = by_rows ? rows : nullptr;
  p.kept_count = by_rows && rows ? row_count : stored_count(w);
  if (!threshold && !by_rows) return p;

  float* const masked = arena().take<float>(batch * padded(w.in));  // padded leaves the 16 that keep needs
  p.x = masked;
  p.x_stride = padded(w.in);
  if (by_rows) {
    for (int64_t b = 0; b < batch; ++b) {
      float* const row = masked + b * p.x_stride;
      __builtin_memcpy(row, x + b * x_stride, size_t(w.in) * sizeof(float));
      if (threshold)
        for (int64_t i = 0; i < w.in; ++i) row[i] = __builtin_fabsf(row[i]) < threshold[i] ? 0.0f : row[i];
      p.isa->arrange(w.dtype, row, w.in);
    }
    return p;
  }
  int32_t* const kept = arena().take<int32_t>(w.in + 16);
  p.kept_count = p.isa->keep(x, x_stride, threshold, batch, w.in, kept, masked);
  p.kept = kept;
  if (batch == 1) return p;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < p.kept_count; ++j) {
      const float v = x[b * x_stride + kept[j]];
      // Another batch row may be the one that keeps this column.
      masked[b * p.x_stride + j] = __builtin_fabsf(v) < threshold[kept[j]] ? 0.0f : v;
    }
  return p;
}

void start_accumulator(float* acc, int64_t acc_stride, const float* bias, int64_t batch, int64_t n) {
  for (int64_t b = 0; b < batch; ++b)
    if (bias)
      __builtin_memcpy(acc + b * acc_stride, bias, size_t(n) * sizeof(float));
    else
      __builtin_memset(acc + b * acc_stride, 0, size_t(n) * sizeof(float));
}

void reduce(float* acc, int64_t acc_stride, const float* partial, int64_t stride, int64_t tasks, int64_t batch, int64_t n) {
  if (tasks <= 1) return;
  const int64_t reducers = tasks_for((tasks - 1) * batch * n * int64_t(sizeof(float)));
  parallel(reducers, [&](int64_t task) {
    const Slice s = slice_of((n + 15) / 16, task, reducers);  // whole lines
    const int64_t end = s.end * 16 < n ? s.end * 16 : n;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t + 1 < tasks; ++t) {
        const float* const from = partial + (t * batch + b) * stride;
        float* const to = acc + b * acc_stride;
        for (int64_t o = s.begin * 16; o < end; ++o) to[o] += from[o];
      }
  });
}

void run(Product* products, int64_t count, int64_t batch, as_stats* stats) {
  int64_t bytes = 0;
  for (int64_t k = 0; k < count; ++k) bytes += products[k].bytes();
  const int64_t tasks = tasks_for(bytes);
  for (int64_t k = 0; k < count; ++k)
    if (products[k].w->layout == AS_COLUMNS && tasks > 1)
      products[k].partial = arena().take<float>((tasks - 1) * batch * padded(products[k].w->out));

  parallel(tasks, [&](int64_t task) {
    for (int64_t k = 0; k < count; ++k) {
      const Product& p = products[k];
      const as_matrix& w = *p.w;
      const Slice s = slice_of(p.kept_count, task, tasks);
      const int32_t* const idx = p.kept ? p.kept + s.begin : nullptr;
      if (w.layout == AS_ROWS) {
        p.isa->dot_rows(w.dtype, w.data, w.stride, idx, s.begin, s.size(), p.x, p.x_stride, batch, w.in,
                        p.out + s.begin, p.out_stride);
        if (w.bias)
          for (int64_t b = 0; b < batch; ++b)
            for (int64_t j = s.begin; j < s.end; ++j) p.out[b * p.out_stride + j] += w.bias[p.kept ? p.kept[j] : j];
      } else {
        const int64_t stride = task ? padded(w.out) : p.out_stride;
        float* const acc = task ? p.partial + (task - 1) * batch * stride : p.out;
        start_accumulator(acc, stride, task ? nullptr : w.bias, batch, w.out);
        p.isa->add_rows(w.dtype, w.data, w.stride, idx, s.begin, s.size(), p.x + s.begin, p.x_stride, batch, w.out,
                        acc, stride);
      }
    }
  });
  for (int64_t k = 0; k < count; ++k)
    if (products[k].w->layout == AS_COLUMNS)
      reduce(products[k].out, products[k].out_stride, products[k].partial, padded(products[k].w->out), tasks, batch,
             products[k].w->out);
  count_rows(stats, 0, 0, 0, bytes);
}

}  // namespace actsparse

using namespace actsparse;

namespace {

const float* widened(const void* x, int64_t batch, int64_t n, int32_t dtype, int64_t* stride) {
  if (dtype == AS_F32) {
    *stride = n;
    return static_cast<const float*>(x);
  }
  *stride = padded(n);
  float* const wide = arena().take<float>(batch * *stride);
  for (int64_t b = 0; b < batch; ++b)
    ops().widen(dtype, static_cast<const char*>(x) + b * n * element_size(dtype), wide + b * *stride, n);
  return wide;
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
  if (!w || !valid_matrix(*w) || !valid_call(x, y, batch, io_dtype)) return AS_EINVAL;
  try {
    arena().reset();
    int64_t x_stride;
    const float* const xf = widened(x, batch, w->in, io_dtype, &x_stride);
    const int64_t y_stride = padded(w->out);
    float* const yf = arena().take<float>(batch * y_stride);
    Product p = prepare(*w, threshold, xf, x_stride, batch, yf, y_stride);
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
    int64_t x_stride;
    const float* const xf = widened(x, batch, w->in, io_dtype, &x_stride);
    const int64_t y_stride = padded(row_count);
    float* const yf = arena().take<float>(batch * y_stride);
    Product p = prepare(*w, nullptr, xf, x_stride, batch, yf, y_stride, rows, row_count);
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
    int64_t x_stride;
    const float* const xf = widened(x, batch, f->up.in, io_dtype, &x_stride);
    const int64_t y_stride = padded(f->down.out);
    float* const yf = arena().take<float>(batch * y_stride);
    ffn(*f, xf, x_stride, yf, y_stride, batch, stats);
    narrowed(yf, y_stride, y, batch, f->down.out, io_dtype);
  } catch (const std::bad_alloc&) {
    return AS_ENOMEM;
  }
  return AS_OK;
}
