// What is done with each row by itself: norms, the gate, and what comes between the projection of
// q, k and v and attention. Sums go over 16 lanes in a fixed order; everything else is one formula
// an element. So a row's bits do not depend on the rows beside it.
#include "rows.h"

#include "kernels.h"

namespace penstock {
namespace {

constexpr long kFewElements = 1 << 14;  // below, a second thread costs more than it saves

// Turns pairs that lie side by side by angles given as (cosine, sine). Fused by name: of a c - b s and
// a s + b c side by side g++ makes one instruction that fuses them on x86-64 (vfmaddsub), whatever
// -ffp-contract says, and only where it vectorizes.
PENSTOCK_INLINE void rotate(float* x, const float* rotation, long key_dim) {
  for (long i = 0; i < key_dim; i += 2) {
    const float a = x[i], b = x[i + 1], c = rotation[i], s = rotation[i + 1];
    x[i] = __builtin_fmaf(a, c, -(b * s));
    x[i + 1] = __builtin_fmaf(a, s, b * c);
  }
}

template <class T>
PENSTOCK_INLINE void narrow_row(const float* from, long count, T* to) {
  for (long i = 0; i < count; i++) narrow(from[i], to + i);
}

template <class T>
void attention_inputs_of_row(const AttentionInputs& call, long row) {
  const KvLayer& kv = call.kv;
  const long width = call.heads * kv.key_dim + kv.kv_heads * (kv.key_dim + kv.value_dim);
  float* x = call.qkv + row * width;
  const float* rotation = call.rotations + row * kv.key_dim;
  T* keys = static_cast<T*>(kv.keys) + call.pages[row] * kv.key_page_stride;
  T* values = static_cast<T*>(kv.values) + call.pages[row] * kv.value_page_stride;
  for (long head = 0; head < call.heads + kv.kv_heads; head++, x += kv.key_dim) {
    if (call.norm != nullptr) {
      const float* weight = call.norm + head * kv.key_dim;
      const float inverse = inverse_rms(x, kv.key_dim, call.epsilon);
      for (long i = 0; i < kv.key_dim; i++) x[i] = x[i] * inverse * weight[i];
    }
    rotate(x, rotation, kv.key_dim);
    if (head >= call.heads) {
      const long slot = (head - call.heads) * kv.page_size + call.offsets[row];
      narrow_row(x, kv.key_dim, keys + slot * kv.key_stride);
    }
  }
  for (long head = 0; head < kv.kv_heads; head++, x += kv.value_dim) {
    const long slot = head * kv.page_size + call.offsets[row];
    narrow_row(x, kv.value_dim, values + slot * kv.value_stride);
  }
}

template <class T>
void attention_inputs(const AttentionInputs& call) {
  const long elements = call.rows * (call.heads + 2 * call.kv.kv_heads) * call.kv.key_dim;
#pragma omp parallel for schedule(static) if (elements > kFewElements)
  for (long row = 0; row < call.rows; row++) attention_inputs_of_row<T>(call, row);
}

}  // namespace
}  // namespace penstock

using namespace penstock;

void penstock_rms_norm(const float* x, const float* weight, float* y, int64_t rows,
                       int64_t columns, int64_t x_stride, float epsilon) {
#pragma omp parallel for schedule(static) if (rows * columns > kFewElements)
  for (long row = 0; row < rows; row++) {
    const float* from = x + row * x_stride;
    float* to = y + row * columns;
    const float inverse = inverse_rms(from, columns, epsilon);
    for (long i = 0; i < columns; i += kLanes) {
      store_some(to + i, normed(from, inverse, weight, i, columns), columns - i);
    }
  }
}

void penstock_silu_multiply(const float* x, float* y, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > kFewElements)
  for (long row = 0; row < rows; row++) {
    for (long i = 0; i < columns; i += kLanes) {
      store_some(y + row * columns + i, gated(x + row * 2 * columns, i, columns), columns - i);
    }
  }
}

void penstock_attention_inputs(const AttentionInputs* call) {
  switch (call->kv.element) {
    case 0:
      return attention_inputs<float>(*call);
    case 1:
      return attention_inputs<bf16>(*call);
    default:
      return attention_inputs<f16>(*call);
  }
}
