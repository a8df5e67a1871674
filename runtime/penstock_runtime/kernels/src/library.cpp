#include <cstddef>

#include "kernels.h"

#ifndef PENSTOCK_SOURCE_DIGEST
#error "compile with penstock_runtime.kernels.build: it names the digest of the sources"
#endif

const char* penstock_source_digest() { return PENSTOCK_SOURCE_DIGEST; }

int64_t penstock_structure_bytes(int64_t index) {
  const size_t bytes[] = {sizeof(Linear), sizeof(KvLayer), sizeof(AttentionInputs),
                          sizeof(Attention), sizeof(Matrix), sizeof(DecoderLayer), sizeof(LastRows),
                          sizeof(Step)};
  return static_cast<int64_t>(bytes[index]);
}

int penstock_has_bf16_products() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}
