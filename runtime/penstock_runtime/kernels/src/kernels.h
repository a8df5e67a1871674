// The interface of the library: plain C, called by ctypes from native.py, which mirrors the
// structures. All sizes and strides are in elements; strides lead from one row to the next.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// What the library was compiled from: library.py compares it with the sources beside it.
const char* penstock_source_digest();

// Bytes of the structures Linear, KvLayer, AttentionInputs, Attention, Matrix, DecoderLayer, LastRows and
// Step, in this order: a test holds them against the mirrors in Python.
int64_t penstock_structure_bytes(int64_t index);

// 1 if the processor's own instruction multiplies pairs of bfloat16, 0 if it is emulated.
int penstock_has_bf16_products();

// --- linear.cpp: y = x · Wᵀ (+ bias) (+ y) ------------------------------------------------------

// Elements of a packed weight. bf16 wants an even number of inputs.
int64_t penstock_packed_elements(int64_t outputs, int64_t inputs);
void penstock_pack_f32(const float* weight, int64_t outputs, int64_t inputs, float* packed);
void penstock_pack_bf16(const uint16_t* weight, int64_t outputs, int64_t inputs, uint16_t* packed);

// The same in 12 bits an element, without loss (coded.h). `coded` has room for penstock_coded_bytes.
// Returns the bytes used, from its first; 0 if they are too few, inputs is no multiple of 4, or there was
// no memory to work in: then the weight is to be packed.
int64_t penstock_coded_bytes(int64_t outputs, int64_t inputs);
int64_t penstock_code_bf16(const uint16_t* weight, int64_t outputs, int64_t inputs, void* coded);

enum WeightKind : int64_t {
  kFloat32 = 0,
  kBfloat16 = 1,       // widened to float32, products and sums in float32
  kBfloat16Pairs = 2,  // x rounded to bfloat16, products of pairs, sums in float32
  kBfloat16Coded = 3,  // the same, of a weight that is coded
};

struct Linear {
  const float* x;  // (rows, inputs)
  int64_t x_stride;
  const void* weight;  // packed
  int64_t kind;        // WeightKind
  const float* bias;   // (outputs,) or null
  float* y;            // (rows, outputs), contiguous
  int64_t rows, outputs, inputs;
  int64_t accumulate;  // 1: add to y
};

// Returns 0, or 1 if there was no memory to work in.
int penstock_linear(const Linear* call);

// --- rows.cpp: what is done with each row by itself -------------------------------------------

void penstock_rms_norm(const float* x, const float* weight, float* y, int64_t rows,
                       int64_t columns, int64_t x_stride, float epsilon);

// y = silu(x[:, :columns]) · x[:, columns:]; x is (rows, 2 · columns), contiguous.
void penstock_silu_multiply(const float* x, float* y, int64_t rows, int64_t columns);

// How one layer's keys and values lie in the pool. Element (page, head, token, i) of a plane is at
// page · page_stride + (head · page_size + token) · stride + i, with the strides of that plane. Values
// may be a part of the keys, as with a latent.
struct KvLayer {
  void* keys;
  void* values;
  int64_t element;  // 0 float32, 1 bfloat16, 2 float16
  int64_t page_size, kv_heads, key_dim, value_dim;
  int64_t key_page_stride, key_stride, value_page_stride, value_stride;
};

// Norms and rotates q and k, q in place, and writes k and v into the pages.
struct AttentionInputs {
  float* qkv;  // (rows, heads · key_dim + kv_heads · (key_dim + value_dim)), contiguous
  int64_t rows, heads;
  const float* norm;       // (heads + kv_heads, key_dim), or null: no norm
  const float* rotations;  // (rows, key_dim / 2, 2): cosine and sine; pairs lie side by side
  const int64_t* pages;    // (rows,)
  const int64_t* offsets;  // (rows,): the token in its page
  float epsilon;
  KvLayer kv;
};

void penstock_attention_inputs(const AttentionInputs* call);

// --- attention.cpp ----------------------------------------------------------------------------

struct Attention {
  const float* q;  // (rows, heads, key_dim), heads contiguous
  int64_t q_stride;
  float* out;  // (rows, heads, value_dim), contiguous
  int64_t heads, segments;
  const int64_t* starts;         // (segments,): position of the segment's first query
  const int64_t* lengths;        // (segments,): its queries
  const int64_t* first_rows;     // (segments,): its first row
  const int64_t* first_pages;    // (segments,): where its pages begin in `pages`
  const int64_t* pages;          // all segments' pages
  float scale;
  int64_t pairs;  // 1: q and weights rounded to bfloat16, products of pairs; wants bfloat16 pages and
                  // an even key_dim
  KvLayer kv;
};

// Returns 0, or 1 if there was no memory to work in.
int penstock_attention(const Attention* call);

// --- layers.cpp: whole layers -----------------------------------------------------------------

struct Matrix {
  const void* weight;  // packed
  int64_t kind;        // WeightKind
  const float* bias;   // (outputs,) or null
  int64_t outputs, inputs;
};

// All layers of a call have matrices of the same sizes. Of the first one attention may be missing, of
// the last one what follows it: another stage has that.
struct DecoderLayer {
  const float* attention_norm;  // (hidden,); null: no attention
  Matrix qkv;
  const float* head_norm;  // (heads + kv_heads, key_dim), or null
  Matrix output;
  const float* mlp_norm;  // (hidden,); null: no feed-forward
  Matrix gate_up, down;
  KvLayer kv;
};

// The rows of a batch whose hidden states are wanted in the end. Of the last layer the others leave their
// keys and values only.
struct LastRows {
  float* x;             // (rows, hidden), contiguous: takes the hidden states
  const int64_t* rows;  // (count,): which of the step's
  int64_t count;
  Attention attention;     // segments of one token each; without q, q_stride, out and kv
};

// What one forward pass tells all layers.
struct Step {
  float* x;  // (rows, hidden), contiguous; changed
  int64_t rows, hidden;
  int64_t element;  // of hidden states behind each half of a layer, as KvLayer.element
  float epsilon;    // of the norms over hidden
  const int64_t* positions;  // (rows,)
  const float* frequencies;  // (key_dim / 2,): pair i is turned by position · frequencies[i],
  double magnitude;          // and multiplied by this
  AttentionInputs inputs;  // without qkv, norm, rotations and kv
  Attention attention;     // without q, q_stride, out and kv
  const LastRows* last;    // null: all rows. Wants heads · key_dim to be a multiple of
                           // penstock_columns_together
};

// The columns of a packed weight that lie together: a part of them that begins at a multiple of it is a
// packed weight too.
int64_t penstock_columns_together();

// Adds the layers' contributions to x, one after the other; of the last layer to `last->x` if there is
// one, and not to x. Returns 0, or 1 if there was no memory.
int penstock_layers(const DecoderLayer* layers, int64_t count, const Step* step);

// --- limits.cpp: what the machine can do ------------------------------------------------------

// Float32 multiply-adds on registers, by all threads, `repeats` times a dozen of them in each.
// Returns the operations done, two a multiply-add; `sink` takes what the compiler must not drop.
double penstock_spin_products(int64_t repeats, float* sink);
// The same with products of bfloat16 pairs.
double penstock_spin_pairs(int64_t repeats, float* sink);
// Reads `bytes` (a multiple of 256) by all threads.
uint64_t penstock_read(const void* memory, int64_t bytes);

}  // extern "C"
#pragma GCC visibility pop
