// Computes with every kernel, on numbers made from a fixed seed, and prints a digest of each result:
// two libraries that print the same give the same bits. See levels.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

uint64_t state = 1;

// In [-1, 1), the same everywhere.
float random_float() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<float>(static_cast<int32_t>(state >> 32)) / 2147483648.0f;
}

std::vector<float> random_floats(long count, float scale = 1) {
  std::vector<float> made(count);
  for (float& x : made) x = random_float() * scale;
  return made;
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// On a cache line's border, zeros.
char* memory(long bytes) {
  const long lines = (bytes + 63) / 64 * 64;
  void* made = std::aligned_alloc(64, static_cast<size_t>(lines));
  std::memset(made, 0, static_cast<size_t>(lines));
  return static_cast<char*>(made);
}

// FNV-1a of the bits, and a sum that says how far apart results are that differ.
void report(const char* what, long a, long b, const std::vector<float>& result) {
  uint64_t digest = 14695981039346656037ull;
  const auto* bytes = reinterpret_cast<const unsigned char*>(result.data());
  for (size_t i = 0; i < result.size() * sizeof(float); i++) {
    digest = (digest ^ bytes[i]) * 1099511628211ull;
  }
  double sum = 0;
  for (float x : result) sum += static_cast<double>(x) * x;
  std::printf("%s %ld %ld: %016llx, squares %.9g\n", what, a, b,
              static_cast<unsigned long long>(digest), sum);
}

void linear(long rows, long kind) {
  const long inputs = 520, outputs = 200;
  const std::vector<float> x = random_floats(rows * inputs), bias = random_floats(outputs);
  const std::vector<float> weight = random_floats(outputs * inputs, 0.1f);
  std::vector<float> y = random_floats(rows * outputs);
  char* packed = memory(penstock_packed_elements(outputs, inputs) * 4);
  if (kind == kFloat32) {
    penstock_pack_f32(weight.data(), outputs, inputs, reinterpret_cast<float*>(packed));
  } else {
    std::vector<uint16_t> narrow(weight.size());
    for (size_t i = 0; i < weight.size(); i++) narrow[i] = to_bfloat16(weight[i]);
    if (kind == kBfloat16Coded) {
      if (penstock_code_bf16(narrow.data(), outputs, inputs, packed) == 0) std::exit(1);
    } else {
      penstock_pack_bf16(narrow.data(), outputs, inputs, reinterpret_cast<uint16_t*>(packed));
    }
  }
  const Linear call{x.data(), inputs, packed,  kind,   rows % 2 ? bias.data() : nullptr,
                    y.data(), rows,   outputs, inputs, rows % 3 == 0};
  if (penstock_linear(&call) != 0) std::exit(1);
  report("linear", rows, kind, y);
  std::free(packed);
}

void rows() {
  const std::vector<float> x = random_floats(7 * 130), weight = random_floats(130);
  std::vector<float> y(7 * 130);
  penstock_rms_norm(x.data(), weight.data(), y.data(), 7, 130, 130, 1e-6f);
  report("norm", 7, 130, y);
  const std::vector<float> gates = random_floats(7 * 260, 4);
  penstock_silu_multiply(gates.data(), y.data(), 7, 130);
  report("gate", 7, 130, y);
}

// A context is written into pages, then read by chunks and a decode row.
void attention(long element, long pairs, long dim) {
  const long page_size = 16, kv_heads = 2, heads = 6, pages = 300, tokens = 1300;
  const long bytes = element == 0 ? 4 : 2, page = 2 * kv_heads * page_size * dim;
  char* pool = memory(pages * page * bytes);
  const KvLayer kv{pool, pool + kv_heads * page_size * dim * bytes, element, page_size, kv_heads,
                   dim,  dim,                                       page,    dim,       page,
                   dim};
  std::vector<int64_t> table, page_of, place;
  for (long i = 0; i * page_size < tokens; i++) table.push_back(i * 37 % pages);
  for (long t = 0; t < tokens; t++) {
    page_of.push_back(table[t / page_size]);
    place.push_back(t % page_size);
  }
  const long width = (heads + 2 * kv_heads) * dim;
  std::vector<float> qkv = random_floats(tokens * width);
  const std::vector<float> norm = random_floats((heads + kv_heads) * dim);
  const std::vector<float> rotations = random_floats(tokens * dim);
  const AttentionInputs inputs{qkv.data(),      tokens,         heads,        norm.data(),
                               rotations.data(), page_of.data(), place.data(), 1e-6f,
                               kv};
  penstock_attention_inputs(&inputs);
  report("inputs", element, dim, qkv);

  const int64_t starts[] = {0, 1299, 700, 40}, lengths[] = {300, 1, 45, 3};
  const int64_t first_rows[] = {0, 300, 301, 346}, first_pages[] = {0, 0, 0, 0};
  std::vector<float> out(349 * heads * dim);
  const Attention call{qkv.data(), width,       out.data(),   heads, 4,     starts, lengths,
                       first_rows, first_pages, table.data(), 0.125f, pairs, kv};
  if (penstock_attention(&call) != 0) std::exit(1);
  report(pairs ? "attention of pairs" : "attention", element, dim, out);
  std::free(pool);
}

}  // namespace

int main() {
  for (long count : {1, 2, 5, 12, 37, 150}) {
    for (long kind : {kFloat32, kBfloat16, kBfloat16Pairs, kBfloat16Coded}) linear(count, kind);
  }
  rows();
  for (long dim : {64, 80, 24}) {
    for (long element : {0, 1, 2}) attention(element, 0, dim);
    attention(1, 1, dim);
  }
  return 0;
}
