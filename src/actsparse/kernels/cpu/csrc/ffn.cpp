// The fused feed-forward block.
#include <algorithm>

#include "internal.h"

namespace actsparse {
namespace {

// Neurons to consider, and per batch row which of them that row may use.
struct Candidates {
  const int32_t* list = nullptr;  // NULL = every neuron
  int64_t count = 0;
  const float* score = nullptr;  // predictor scores [batch, score_stride] by neuron, NULL = every row may use every candidate
  int64_t score_stride = 0;
  int32_t neuron(int64_t position) const { return list ? list[position] : int32_t(position); }
  // NaN counts as predicted active: a broken activation must reach the output.
  bool admits(int64_t b, int64_t neuron) const { return !score || !(score[b * score_stride + neuron] <= 0.0f); }
};

Candidates find_candidates(const as_ffn& f, const float* x, int64_t x_stride, int64_t batch, as_stats* stats) {
  Candidates c;
  const int64_t neurons = f.up.out;
  c.count = neurons;
  if (f.predictor_b.data) {
    const int64_t rank_stride = padded(f.predictor_a.out), score_stride = padded(neurons);
    float* const low = arena().take<float>(batch * rank_stride);
    float* const score = arena().take<float>(batch * score_stride);
    Product a = prepare(f.predictor_a, nullptr, x, x_stride, batch, low, rank_stride);
    run(&a, 1, batch, stats);
    Product b = prepare(f.predictor_b, nullptr, low, rank_stride, batch, score, score_stride);
    run(&b, 1, batch, stats);
    c.score = score;
    c.score_stride = score_stride;
  }
  if (!f.predictor_b.data && !f.neurons) return c;
  if (!f.predictor_b.data) {
    c.list = f.neurons;
    c.count = f.neuron_count;
    return c;
  }
  int32_t* const list = arena().take<int32_t>(neurons);
  const int64_t from_count = f.neurons ? f.neuron_count : neurons;
  int64_t n = 0;
  for (int64_t i = 0; i < from_count; ++i) {
    const int32_t neuron = f.neurons ? f.neurons[i] : int32_t(i);
    bool any = false;
    for (int64_t b = 0; b < batch; ++b) any |= c.admits(b, neuron);
    list[n] = neuron;
    n += any;
  }
  c.list = list;
  c.count = n;
  return c;
}

// Those among ascending candidates that are neurons of the slice.
Slice among(const Candidates& c, Slice neurons) {
  return {std::lower_bound(c.list, c.list + c.count, neurons.begin) - c.list,
          std::lower_bound(c.list, c.list + c.count, neurons.end) - c.list};
}

// Values of the candidates, [batch, stride], from a product that computed only them (rows) or every neuron (columns).
const float* at_candidates(const Product& p, const Candidates& c, int64_t batch, int64_t* stride) {
  *stride = p.out_stride;
  if (p.w->layout == AS_ROWS || !c.list) return p.out;
  float* const picked = arena().take<float>(batch * *stride);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < c.count; ++j) picked[b * *stride + j] = p.out[b * *stride + c.list[j]];
  return picked;
}

}  // namespace

bool valid_ffn(const as_ffn& f) {
  if (!valid_matrix(f.up) || !valid_matrix(f.down) || f.down.in != f.up.out) return false;
  if (f.gate.data && (!valid_matrix(f.gate) || f.gate.in != f.up.in || f.gate.out != f.up.out)) return false;
  if (f.activation < AS_SILU || f.activation > AS_IDENTITY || f.up_activation < AS_SILU || f.up_activation > AS_IDENTITY)
    return false;
  if (!f.predictor_a.data != !f.predictor_b.data) return false;
  if (f.predictor_a.data && (!valid_matrix(f.predictor_a) || !valid_matrix(f.predictor_b) ||
                             f.predictor_a.in != f.up.in || f.predictor_b.in != f.predictor_a.out ||
                             f.predictor_b.out != f.up.out))
    return false;
  if (is_packed(f.gate) || is_packed(f.up) || is_packed(f.down) || is_packed(f.predictor_a) || is_packed(f.predictor_b)) {
    if ((f.gate.data && !is_packed(f.gate)) || !is_packed(f.up) || !is_packed(f.down)) return false;
    if (f.predictor_a.data || f.neurons || f.gate_in_threshold || f.up_in_threshold) return false;
  }
  return !f.neurons || (f.neuron_count >= 0 && f.neuron_count <= f.up.out);
}

void Gating::gate(int64_t row, int64_t first, int64_t n) const {
  float* const g = v + row * stride + first;
  const float* const up = u ? u + row * stride + first : nullptr;
  if (f->gate_threshold || f->value_threshold) {
    for (int64_t i = 0; i < n; ++i) {
      const float product = up ? g[i] * up[i] : g[i];
      const bool dropped = (f->gate_threshold && __builtin_fabsf(g[i]) < f->gate_threshold[first + i]) ||
                           (f->value_threshold && __builtin_fabsf(product) < f->value_threshold[first + i]);
      g[i] = dropped ? 0.0f : f->mean ? product - f->mean[first + i] : product;
    }
    return;
  }
  if (up) combine(g, up, n, [](auto x, auto y) { return x * y; });
  if (f->mean) combine(g, f->mean + first, n, [](auto x, auto y) { return x - y; });
}

void packed_ffn(const as_ffn& f, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t batch, as_stats* stats,
                const as_norm* norm, const Stream* stream, bool onto, float onto_scale) {
  const bool gated = f.gate.data != nullptr;
  const int64_t neurons = f.up.out, stride = padded(neurons);
  float* const v = arena().take<float>(batch * stride);
  float* const u = gated ? arena().take<float>(batch * stride) : nullptr;
  Product products[2] = {prepare(gated ? f.gate : f.up, nullptr, x, x_stride, batch, v, stride), {}};
  products[0].activation = f.activation;
  if (gated) {
    products[1] = prepare(f.up, nullptr, x, x_stride, batch, u, stride);
    products[1].activation = f.up_activation;
  }
  for (Product& p : products) {
    p.norm = norm;
    p.stream = norm ? stream : nullptr;
  }
  Product* const both[2] = {products, products + 1};
  const Gating gating = {&f, v, u, stride};
  run_packed(both, gated ? 2 : 1, batch, stats, &gating);
  Product down = prepare(f.down, nullptr, v, stride, batch, y, y_stride);
  down.onto = onto ? stream : nullptr;
  down.onto_scale = onto_scale;
  run(&down, 1, batch, stats);
}

void ffn(const as_ffn& f, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t batch, as_stats* stats) {
  if (is_packed(f.up)) return packed_ffn(f, x, x_stride, y, y_stride, batch, stats);
  const IsaOps& isa = ops();
  const bool gated = f.gate.data != nullptr, up_rows = f.up.layout == AS_ROWS;
  const Candidates c = find_candidates(f, x, x_stride, batch, stats);
  const int64_t stride = padded(f.up.out);

  // The matrix that decides, and up beside it when up cannot skip neurons anyway.
  const as_matrix& first = gated ? f.gate : f.up;
  float* const first_out = arena().take<float>(batch * stride);
  Product products[2];
  int64_t product_count = 1;
  products[0] = prepare(first, gated ? f.gate_in_threshold : f.up_in_threshold, x, x_stride, batch, first_out, stride,
                        c.list, c.count);
  // By rows a value is complete where it is computed; by columns only once all tasks have added to it.
  if (first.layout == AS_ROWS) products[0].activation = f.activation;
  if (gated && !up_rows) {
    float* const up_out = arena().take<float>(batch * stride);
    products[product_count++] = prepare(f.up, f.up_in_threshold, x, x_stride, batch, up_out, stride);
  }
  run(products, product_count, batch, stats);
  int64_t g_stride, u_stride = 0;
  float* const g = const_cast<float*>(at_candidates(products[0], c, batch, &g_stride));
  const float* const u_known = product_count == 2 ? at_candidates(products[1], c, batch, &u_stride) : nullptr;
  if (first.layout != AS_ROWS)
    for (int64_t b = 0; b < batch; ++b) isa.activate(f.activation, g + b * g_stride, c.count);

  const float* gate_threshold = f.gate_threshold;
  if (gate_threshold && c.list) {
    float* const picked = arena().take<float>(c.count);
    for (int64_t j = 0; j < c.count; ++j) picked[j] = gate_threshold[c.list[j]];
    gate_threshold = picked;
  }
  // One region decides which neurons are kept, and computes up and down for them.
  const bool down_columns = f.down.layout == AS_COLUMNS, dot_up = gated && up_rows;
  const int64_t up_bytes = dot_up ? stored_bytes(f.up) : 0, down_bytes = down_columns ? stored_bytes(f.down) : 0;
  // What a predictor leaves depends on all batch rows, so its candidates are cut where the neurons are: a row's sums do not
  // depend on the others.
  const bool predicted = f.predictor_b.data != nullptr;
  const int64_t cut = predicted ? f.up.out : c.count, tasks = tasks_for(cut * (up_bytes + down_bytes));
  // Every further segment has sums of its own: few beside the weights, or there are none.
  const int64_t fine_sums = Segments::rounds * tasks * f.down.out * int64_t(sizeof(float));
  const Segments segments(tasks, 16 * fine_sums < cut * (up_bytes + down_bytes));
  const int64_t v_stride = padded(down_columns ? c.count : f.up.out);
  float* const v = arena().take<float>(batch * v_stride);
  const Sums sums = down_columns ? Sums(segments, f.down, batch, y, y_stride) : Sums();
  int32_t* const used = arena().take<int32_t>(c.count + 1);
  const int64_t dots_stride = padded(c.count);
  float* const dots = dot_up ? arena().take<float>(batch * dots_stride) : nullptr;
  // Only for its masked input: the rows wanted are split over the tasks below, together with down's columns.
  Product up = dot_up ? prepare(f.up, f.up_in_threshold, x, x_stride, batch, dots, dots_stride) : Product();
  if (dot_up) up.make_room(tasks, batch);
  int64_t* const used_count = arena().take<int64_t>(segments.number());

  Activations decisive;
  decisive.x = g;
  decisive.stride = g_stride;
  const Kept found = gate_threshold ? Kept(isa, decisive, gate_threshold, batch, c.count, segments.number(), false) : Kept();
  int32_t* const where = gate_threshold ? arena().take<int32_t>(c.count) : nullptr;
  int32_t* const named = gate_threshold && c.list ? arena().take<int32_t>(c.count) : nullptr;
  // Kept neurons, by position among the candidates and by name.
  const int32_t* const position = where;
  const int32_t* const neuron = named ? named : where ? where : c.list;

  const auto compute = [&](int64_t segment, const float* up_x) {
    Slice s = segments.slice(cut, segment);
    if (predicted) s = among(c, s);
    if (gate_threshold) {
      const KeptList kept = found.find(segment, s);
      __builtin_memcpy(where + s.begin, kept.positions, size_t(kept.count) * sizeof(int32_t));
      s.end = s.begin + kept.count;
    }
    if (named)
      for (int64_t j = s.begin; j < s.end; ++j) named[j] = c.list[where[j]];
    if (dot_up)
      up.isa->dot_rows(f.up.dtype, f.up.data, f.up.stride, neuron ? neuron + s.begin : nullptr, s.begin, s.size(), up_x,
                       padded(f.up.in), batch, f.up.in, dots + s.begin, dots_stride);
    const float* u = dots;
    int64_t from_stride = dots_stride;
    if (u_known) {
      u = u_known;
      from_stride = u_stride;
    }
    float* const scratch = dots ? dots : v;  // where up's values are biased and activated; in columns layout, v itself
    const int64_t scratch_stride = dots ? dots_stride : v_stride;
    if (gated)
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t j = s.begin; j < s.end; ++j) {
          const int64_t at = u_known && position ? position[j] : j;
          const float bias = dots && f.up.bias ? f.up.bias[neuron ? neuron[j] : j] : 0.0f;
          scratch[b * scratch_stride + j] = u[b * from_stride + at] + bias;
        }
        isa.activate(f.up_activation, scratch + b * scratch_stride + s.begin, s.size());
      }
    int64_t n = s.begin;
    for (int64_t j = s.begin; j < s.end; ++j) {
      const int64_t at = position ? position[j] : j;
      const int32_t i = neuron ? neuron[j] : int32_t(j);
      bool any = false;
      for (int64_t b = 0; b < batch; ++b) {
        const float gb = g[b * g_stride + at];
        const float product = gated ? gb * scratch[b * scratch_stride + j] : gb;
        const bool dropped = (gate_threshold && __builtin_fabsf(gb) < gate_threshold[at]) ||
                             (f.value_threshold && __builtin_fabsf(product) < f.value_threshold[i]) || !c.admits(b, i);
        any |= !dropped;
        // n <= j: entries are compacted in place behind the reader.
        v[b * v_stride + n] = dropped ? 0.0f : product - (f.mean ? f.mean[i] : 0.0f);
      }
      used[n] = i;
      n += any;
    }
    used_count[segment] = n - s.begin;
    if (down_columns) sums.add(isa, segment, 0, n - s.begin, used + s.begin, v + s.begin, v_stride);
  };
  {
    const Stopwatch watch(stats);
    parallel(tasks, [&](int64_t task) {
      const float* const up_x = dot_up ? up.arrange(task, batch) : nullptr;
      segments.each(task, [&](int64_t segment) { compute(segment, up_x); });
    });
    if (down_columns) sums.finish();
  }

  const int64_t kept = gate_threshold ? found.count() : c.count;
  int64_t used_total = 0;
  for (int64_t k = 0; k < segments.number(); ++k) used_total += used_count[k];
  const int64_t first_rows = products[0].count;
  const int64_t up_count = !gated ? first_rows : dot_up ? kept : products[1].count;
  if (!down_columns) {
    // Down stored by rows cannot skip neurons: spread the values over a dense vector.
    const int64_t wide_stride = padded(f.up.out);
    float* const wide = arena().take<float>(batch * wide_stride);
    __builtin_memset(wide, 0, size_t(batch * wide_stride) * sizeof(float));
    for (int64_t k = 0; k < segments.number(); ++k) {
      const Slice s = segments.slice(cut, k);
      const int64_t begin = predicted ? among(c, s).begin : s.begin;
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t j = begin; j < begin + used_count[k]; ++j) wide[b * wide_stride + used[j]] = v[b * v_stride + j];
    }
    Product down = prepare(f.down, nullptr, wide, wide_stride, batch, y, y_stride);
    run(&down, 1, batch, stats);
  }
  count_rows(stats, gated ? first_rows : 0, up_count, down_columns ? used_total : f.down.out,
             kept * up_bytes + used_total * down_bytes);
}

}  // namespace actsparse
