// Matrix products whose input is made on the way.
#pragma once

#include "kernels.h"

namespace penstock {

enum class Made { as_is, normed, gated };

struct Source {
  const float* rows;  // of `gated`: contiguous, the gates, then what they gate
  int64_t stride;
  Made made;
  const float* norm;  // of `normed`: the weight
  float epsilon;
};

// The columns [first, first + count) of a matrix; `first` is a multiple of penstock_columns_together.
Matrix columns(const Matrix& of, long first, long count);

// As penstock_linear, of what is made of the source's rows; the call's own x is not looked at.
int linear(Linear call, const Source& source);

// Two products: of what is made of the source's rows, and of the halves of that, the first one's silu times the
// second. The first call's y is room for it, which may not be needed.
int gated_linear(const Linear& gate_up, const Source& source, const Linear& down);

}  // namespace penstock
