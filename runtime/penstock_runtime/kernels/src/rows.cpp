// What is done with each row by itself: norms, the gate, and what comes between the projection of
// q, k and v and attention. Sums go over 16 lanes in a fixed order; everything else is one formula
// an element. So a row's bits do not depend on the rows beside it.
#include "rows.h"

#include "kernels.h"

namespace penstock {
namespace {

constexpr long kFewElements = 1 << 14;  // below, a second thread costs more than it saves

template <class T>
PENSTOCK_INLINE void narrow_some(const Vec& x, T* to, long count) {
  if (count >= kLanes) return narrow16(x, to);
  narrow_lanes(x, to, count);
}

// Calls `take(i, lanes)` for every 16 elements of a head, normed and turned.
template <class Take>
PENSTOCK_INLINE void norm_and_turn(const float* x, const float* weight, float epsilon,
                                   const float* rotation, long key_dim, const Take& take) {
  const float inverse = weight == nullptr ? 1.0f : inverse_rms(x, key_dim, epsilon);
  for (long i = 0; i < key_dim; i += kLanes) {
    const long left = key_dim - i;
    const Vec lanes = weight == nullptr ? load_some(x + i, left) : normed(x, inverse, weight, i, key_dim);
    take(i, turn_pairs(lanes, load_some(rotation + i, left)));
  }
}

template <class T>
void attention_inputs_of_row(const AttentionInputs& call, long row) {
  const KvLayer& kv = call.kv;
  const long width = call.heads * kv.key_dim + kv.kv_heads * (kv.key_dim + kv.value_dim);
  const long offset = call.offsets[row];
  const float* rotation = call.rotations + row * kv.key_dim;
  const float* weight = call.norm;
  float* x = call.qkv + row * width;
  T* keys = static_cast<T*>(kv.keys) + call.pages[row] * kv.key_page_stride + offset * kv.key_stride;
  T* values =
      static_cast<T*>(kv.values) + call.pages[row] * kv.value_page_stride + offset * kv.value_stride;
  const auto each = [&](long heads, const auto& take) {
    for (long head = 0; head < heads; head++, x += kv.key_dim) {
      norm_and_turn(x, weight, call.epsilon, rotation, kv.key_dim,
                    [&](long i, const Vec& lanes) { take(head, i, lanes); });
      if (weight != nullptr) weight += kv.key_dim;
    }
  };
  each(call.heads, [&](long, long i, const Vec& lanes) { store_some(x + i, lanes, kv.key_dim - i); });
  each(kv.kv_heads, [&](long head, long i, const Vec& lanes) {
    narrow_some(lanes, keys + head * kv.page_size * kv.key_stride + i, kv.key_dim - i);
  });
  for (long head = 0; head < kv.kv_heads; head++, x += kv.value_dim) {
    T* to = values + head * kv.page_size * kv.value_stride;
    for (long i = 0; i < kv.value_dim; i += kLanes) {
      narrow_some(load_some(x + i, kv.value_dim - i), to + i, kv.value_dim - i);
    }
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
