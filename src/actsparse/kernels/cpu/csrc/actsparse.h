// The C interface of actsparse's CPU kernels: raw pointers, no torch headers, loaded with ctypes.
//
// Shape letters: B batch (1..AS_MAX_BATCH rows of activations), H hidden, N neurons, I in, O out, R rank, T positions.
// Every function returns 0, or a negative as_error. Activations (x, y) are contiguous [B, features] in `io_dtype`;
// all arithmetic is float32. A "threshold" keeps a value v unless |v| < threshold, so NaN is always kept (never hidden)
// and a threshold of 0 keeps everything. Exact-zero skipping (ReLU) is a threshold of FLT_MIN.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AS_ABI_VERSION 11
#define AS_MAX_BATCH 8
#define AS_API __attribute__((visibility("default")))

typedef enum { AS_F32 = 0, AS_BF16 = 1, AS_F16 = 2, AS_PACKED = 3 } as_dtype;  // AS_PACKED: as_matrix only
typedef enum { AS_ROWS = 0, AS_COLUMNS = 1 } as_layout;  // what lies contiguous: a row W[o, :] or a column W[:, i]
typedef enum { AS_SILU = 0, AS_RELU = 1, AS_RELU2 = 2, AS_GELU = 3, AS_GELU_TANH = 4, AS_IDENTITY = 5 } as_activation;
typedef enum { AS_NO_NORM = 0, AS_RMS_NORM = 1, AS_LAYER_NORM = 2 } as_norm_kind;
// Over what q and k are normalised: each head with one weight [head_dim] or with its own [heads, head_dim], or all heads at once.
typedef enum { AS_HEADS_ALIKE = 0, AS_EACH_HEAD = 1, AS_ALL_HEADS = 2 } as_heads_norm;
typedef enum { AS_OK = 0, AS_EINVAL = -1, AS_ENOMEM = -2 } as_error;

// W is logically [out, in]; element (o, i) is data[o * stride + i] (AS_ROWS) or data[i * stride + o] (AS_COLUMNS). With dtype
// AS_PACKED (always AS_COLUMNS) data points to an as_packed, which holds its own thresholds: none may be given beside it.
typedef struct {
  const void* data;   // NULL = this matrix is absent
  const float* bias;  // [out] or NULL
  int64_t out, in, stride;
  int32_t dtype, layout;
} as_matrix;

// Nested low-bit weights (docs/format.md), L planes of two bits: column i begins at plane + i * stride (plane p a further
// p * plane_stride on) and mantissa + i * mantissa_stride. x_i - center_i is multiplied with the first k planes, k the number of
// thresholds [L, in] (not falling along L) that it does not lie under in magnitude.
typedef struct {
  const uint8_t *plane, *mantissa;
  int64_t stride, plane_stride, mantissa_stride;  // bytes
  const uint16_t* scale;   // [in] bfloat16
  const float* threshold;  // [L, in]; NULL = every plane is read
  const float* center;     // [in]; NULL = zeros
  float gain[4];           // of each level
  int32_t planes;          // L: 2, 3 or 4
} as_packed;

// Work actually done by one call, added to (not set). Rows counts are per matrix and include each stored row or column once
// per call even when several batch rows use it; bytes are weight bytes read.
typedef struct {
  int64_t gate_rows, up_rows, down_rows, bytes;
  int64_t packed_planes, packed_weights;  // planes of columns read, and weights of the packed matrices multiplied
  int64_t product_ns;  // in the parallel regions that multiply, with waking and joining threads; the rest is overhead
} as_stats;

// One feed-forward block:
//   candidates C: every neuron | `neurons` list | predictor B(Ax)+b > 0
//   g = act(gate[C] x~gate)          x~gate = x kept by gate_in_threshold (whole x when NULL)
//   kept K: i in C with not (|g_i| < gate_threshold_i)
//   u = up[K] x~up                   (up_act applied to u: AS_IDENTITY, or AS_RELU for dReLU)
//   v = g * u - mean_i for i in K; then v_i is dropped when |g_i u_i| < value_threshold_i
//   y = down.bias + sum over K of v_i down[:, i]
// With gate.data == NULL there is no gate: g is act(up[C] x), v = g - mean (plain FFN, as OPT); thresholds apply to g.
// gate and up may be AS_ROWS (neurons skipped) or AS_COLUMNS (inputs skipped by *_in_threshold); in AS_COLUMNS layout
// every neuron of the candidates is still computed (no rows can be skipped) and thresholds only decide down.
// Packed matrices take neither neurons nor predictor.
typedef struct {
  as_matrix gate, up, down;  // [N, H], [N, H], [H, N]; down is AS_COLUMNS for real skipping
  int32_t activation, up_activation;
  const float* gate_in_threshold;  // [H] or NULL
  const float* up_in_threshold;    // [H] or NULL
  const float* gate_threshold;     // [N] or NULL
  const float* value_threshold;    // [N] or NULL
  const float* mean;               // [N] or NULL
  as_matrix predictor_a, predictor_b;  // [R, H], [N, R] (+ bias [N]); data NULL when absent
  const int32_t* neurons;          // ascending neuron indices or NULL
  int64_t neuron_count;
} as_ffn;

typedef struct {
  const float* weight;  // [H]; NULL = no normalisation weight
  const float* bias;    // [H] or NULL (LayerNorm)
  float eps;
  int32_t kind;  // as_norm_kind; all zeros = no norm
} as_norm;

typedef struct {
  as_norm input_norm, post_norm;              // before the attention and before the feed-forward block
  as_norm attention_out_norm, ffn_out_norm;   // of what either gives, before it joins the residual stream
  as_matrix q, k, v, o;
  const float *q_threshold, *k_threshold, *v_threshold, *o_threshold;  // [in] or NULL
  as_norm q_norm, k_norm;
  int32_t heads_norm;  // as_heads_norm
  int32_t parallel;    // not 0: the feed-forward block reads what q, k and v read (post_norm is not used)
  as_ffn ffn;
  void *k_cache, *v_cache;     // [kv_heads, cache_length, head_dim] in cache_dtype
  const float *cosine, *sine;  // [cache_length, rotary / 2]; NULL = no rotary embedding
  int64_t rotary;              // channels at the head's beginning that are rotated
  int64_t window;              // sliding attention window in positions, 0 = none
} as_layer;

// One decoder of the Llama kind (two residual blocks a layer, grouped-query attention) and the caches of one sequence. Where a cap
// is not 0, scores or logits s become cap * tanh(s / cap).
typedef struct {
  int64_t layers, hidden, heads, kv_heads, head_dim, cache_length;
  const as_layer* layer;
  as_matrix embedding, lm_head;  // embedding [vocab, H] AS_ROWS
  as_matrix positions;           // [cache_length or more, H] AS_ROWS, added to the embedding; data NULL when absent
  as_norm final_norm;
  const float* query_scale;      // [cache_length], times attention_scale; NULL = ones
  float attention_scale, embedding_scale, logit_scale, residual_scale;
  float attention_cap, logit_cap;
  int32_t cache_dtype;
} as_decoder;

typedef struct as_call {  // one product or block at batch 1: ffn, or w with rows (row_count >= 0), or w with a threshold or NULL
  const as_ffn* ffn;
  const as_matrix* w;
  const float* threshold;
  const int32_t* rows;
  int64_t row_count;
  const void* x;
  void* y;
} as_call;

// A block of a matrix's columns that is rounded to nested codes; what belongs to a weight lies in [columns, outputs].
typedef struct {
  int64_t columns, outputs, groups;  // columns at most AS_ROUNDING_COLUMNS where `matrix` is used; outputs = 64 groups
  int32_t stored;                    // bits of a code: 4, 6 or 8
  const float* half_range;           // [columns, groups]
  const float* shares;               // [1 + stored / 2, columns], of input energy that is read at each level, 0 (skipped) first
  int64_t shares_stride;
  const float* gain;                 // [stored / 2]
  const float* matrix;               // [columns, columns]: the factor of feedback, or the Hessian
  int64_t matrix_stride;
  uint8_t* codes;
} as_rounding;
#define AS_ROUNDING_COLUMNS 128

AS_API int32_t as_abi_version(void);
// Takes the addresses of torch's torch_parallel_for and torch_get_num_threads (torch >= 2.10); NULL = run serially.
AS_API void as_set_threads(void* torch_parallel_for, void* torch_get_num_threads);
// Names compiled in and supported by this CPU, best first, comma separated; the one in use; choose one (tests, doctor).
AS_API const char* as_isa_available(void);
AS_API const char* as_isa(void);
AS_API int32_t as_isa_select(const char* name);
// On how many pages of 4 KB at a time packed products expect this machine's prefetchers to follow what is read, 0 where that is not known; expect
// another number, 0 to 256 (tests, benchmarks). Results are the same to the bit.
AS_API int32_t as_pages_followed(void);
AS_API int32_t as_pages_select(int32_t pages);

// y = W x~ + bias, x~ = x kept by threshold ([in] or NULL). AS_COLUMNS reads kept columns only.
AS_API int32_t as_linear(const as_matrix* w, const float* threshold, const void* x, void* y, int64_t batch, int32_t io_dtype,
                  as_stats* stats);
// y[b, i] = W[i] . x[b] + bias for the rows named in `rows` (ascending); every other y is left untouched. AS_ROWS only.
AS_API int32_t as_linear_rows(const as_matrix* w, const int32_t* rows, int64_t row_count, const void* x, void* y, int64_t batch,
                       int32_t io_dtype, as_stats* stats);
// Columns [begin, end) of a packed matrix read to `level` planes, as out [end - begin, w->out] of out_dtype.
AS_API int32_t as_unpack(const as_matrix* w, int64_t begin, int64_t end, int32_t level, void* out, int32_t out_dtype);
// y = start + W (x - center), every plane of a packed matrix without thresholds; x [rows, in] and y [rows, out] in bfloat16,
// sums in float32. Whether the instruction set in use has it: as_has_many_rows.
AS_API int32_t as_many_rows(const as_matrix* w, const void* x, void* y, int64_t rows);
AS_API int32_t as_has_many_rows(void);
// Rounds a block of weights, each column's error passed on to those after it by the factor's rows. `rest` holds the weights and what
// those before the block moved them by; it becomes what each column stood at. `errors`: what codes leave of weights as they are read.
AS_API int32_t as_round_block(const as_rounding* block, const float* weight, float* rest, float* errors);
// What codes leave of weights: as they are read on average, and with every plane.
AS_API int32_t as_code_errors(const as_rounding* block, const float* weight, float* as_read, float* whole);
// One sweep of coordinate descent over a block: codes that cost less replace the present ones, errors follow. `read_pull` and
// `whole_pull` are the Hessian's rows of the block times the errors of all columns; `prompts` is the weight of the whole error.
// `stood` becomes the weights that would leave nothing to gain.
AS_API int32_t as_descend_block(const as_rounding* block, float prompts, const float* weight, float* as_read, float* whole,
                                const float* read_pull, const float* whole_pull, float* stood);
AS_API int32_t as_ffn_forward(const as_ffn* ffn, const void* x, void* y, int64_t batch, int32_t io_dtype, as_stats* stats);
// One token: embeds `token`, appends to the caches at `position`, writes float32 logits [vocab].
AS_API int32_t as_decode_step(const as_decoder* decoder, int64_t token, int64_t position, float* logits, as_stats* stats);
// The same for one token of each of `batch` sequences, whose decoders were made of one model and differ in their caches: a row
// of logits [batch, vocab] has the bits that as_decode_step gives for its sequence alone. What is read for several rows counts
// once, in stats [layers + 1] (the last is the output head's) or nowhere if NULL. Decoders with chosen neurons are refused.
AS_API int32_t as_decode_together(const as_decoder* const* decoders, const int64_t* tokens, const int64_t* positions,
                                  int64_t batch, float* logits, as_stats* stats);

// Streaming per-channel statistics of x [tokens, channels] (row stride in elements). counts [channels, bins] or NULL:
// bin 0 exact zeros, bin 1 values under 2^min_exponent, then 2^sub_bits linear bins per octave, last bin open above.
// sum_abs, sum_square [channels] or NULL. Returns the number of non-finite values seen (they are not counted).
AS_API int64_t as_channel_statistics(const void* x, int32_t dtype, int64_t tokens, int64_t channels, int64_t row_stride,
                              uint32_t* counts, int64_t bins, int32_t min_exponent, int32_t sub_bits, double* sum_abs,
                              double* sum_square);
// The strongest channels of each token of x [tokens, channels], by |value| or, if `positive`, by max(value, 0): the `count`
// largest, or for count 0 the given share of those that are not 0, rounded to even, at least one. levels [tokens]: the weakest
// of them. counts [channels]: tokens that have the channel among them (not weaker than the level, and not 0). sums
// [channels]: its strengths in units of the tokens' levels. All three are set. Values must be finite.
AS_API int32_t as_core_statistics(const void* x, int32_t dtype, int64_t tokens, int64_t channels, int64_t row_stride,
                                  int64_t count, float share, int32_t positive, float* levels, float* counts, float* sums);
// Moves the whole 2 MiB pages inside [data, data + bytes) of ordinary memory onto huge pages, so that rows scattered over it
// do not each miss the TLB. Contents, addresses and memory use stay as they are. Returns the bytes that lie on huge pages
// then; 0 where the system cannot (not Linux, before 6.1, a file's mapping, memory too fragmented). Never fails.
AS_API int64_t as_huge_pages(const void* data, int64_t bytes);
// Reads `bytes` from data with every thread and returns a checksum: the read-bandwidth test.
AS_API double as_read(const void* data, int64_t bytes);
// Makes the calls one after the other, as a decode step does, and returns the seconds; negative when one was refused.
AS_API double as_time_calls(const as_call* calls, int64_t count, int32_t io_dtype);

#ifdef __cplusplus
}
#endif
