// Coding weights (coded.h): of each two panels the most frequent upper bytes, then all units, those that
// have another one as they are.
#include "coded.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"

#include <omp.h>

namespace penstock {
namespace {

// Two panels of a weight as it was given, to be coded. Columns that are not there are zeros.
class PairOfPanels {
 public:
  PairOfPanels(const uint16_t* weight, long outputs, long inputs, long index)
      : count_(std::min<long>(kPackedColumns, outputs - index * kPackedColumns)) {
    for (long n = 0; n < count_; n++) columns_[n] = weight + (index * kPackedColumns + n) * inputs;
    long counts[2][256] = {};  // two: counting the same byte again waits for the time before
    counts[0][0] = (kPackedColumns - count_) * inputs;
    for (long n = 0; n < count_; n++) {
      for (long k = 0; k < inputs; k++) counts[k % 2][columns_[n][k] >> 8]++;
    }
    for (int byte = 0; byte < 256; byte++) counts[0][byte] += counts[1][byte];
    std::memset(places_, kNone, sizeof places_);
    for (int place = 0; place < kUpperBytes; place++) {
      const auto most = std::max_element(counts[0], counts[0] + 256) - counts[0];
      uppers_[place] = static_cast<uint8_t>(most);
      places_[most] = static_cast<uint8_t>(place);
      counts[0][most] = -1;
    }
  }

  const uint8_t* uppers() const { return uppers_; }

  // Returns whether all of the unit's elements are in the table.
  bool code(long unit, uint8_t* to) const {
    uint8_t missing = 0;
    for (long n = 0; n < kPackedColumns; n++) {
      uint16_t of[kUnitRows];
      read(unit, n, of);
      uint8_t* block = to + 16 * (n % kLanes / 4) + 8 * (n / kLanes) + 2 * (n % 4);
      for (int i = 0; i < 2; i++) {
        const uint8_t first = places_[of[i] >> 8], second = places_[of[2 + i] >> 8];
        missing |= first | second;
        block[i] = static_cast<uint8_t>((first & 15) | second << 4);
        block[kLows + i] = static_cast<uint8_t>(of[i]);
        block[kLows + kLine + i] = static_cast<uint8_t>(of[2 + i]);
      }
    }
    return missing < kNone;
  }

  void copy(long unit, bf16* to) const {
    for (long n = 0; n < kPackedColumns; n++) {
      uint16_t of[kUnitRows];
      read(unit, n, of);
      for (int i = 0; i < kUnitRows; i++) to[i / 2 * 2 * kPackedColumns + 2 * n + i % 2] = of[i];
    }
  }

 private:
  static constexpr uint8_t kNone = 16;

  void read(long unit, long column, uint16_t (&of)[kUnitRows]) const {
    if (column < count_) {
      std::memcpy(of, columns_[column] + unit * kUnitRows, sizeof of);
    } else {
      std::memset(of, 0, sizeof of);
    }
  }

  long count_;
  const uint16_t* columns_[kPackedColumns];
  uint8_t uppers_[kUpperBytes], places_[256];
};

// How a coded weight lies in memory: the table of pairs, then of each the numbers of its plain units, and
// all units.
struct CodedLayout {
  long pairs, units;  // units: of one pair

  CodedLayout(long outputs, long inputs)
      : pairs((outputs + kPackedColumns - 1) / kPackedColumns), units(inputs / kUnitRows) {}

  static long numbers_bytes(long plain) {
    return round_up((plain + 1) * static_cast<long>(sizeof(int32_t)), kLine);
  }
  long units_bytes(long plain) const {
    return (units - plain) * kUnitBytes + plain * kPlainBytes;
  }
  long pair_bytes(long plain) const { return numbers_bytes(plain) + units_bytes(plain); }
  long first() const { return round_up(pairs * static_cast<long>(sizeof(CodedPair)), kLine); }
  // With a sixteenth of the units as they are.
  long bytes() const { return first() + pairs * pair_bytes(units / 16); }
};

}  // namespace
}  // namespace penstock

using namespace penstock;

int64_t penstock_coded_bytes(int64_t outputs, int64_t inputs) {
  return CodedLayout(outputs, inputs).bytes();
}

int64_t penstock_code_bf16(const uint16_t* weight, int64_t outputs, int64_t inputs, void* coded) {
  if (inputs % kUnitRows) return 0;
  const CodedLayout layout(outputs, inputs);
  auto* pairs = static_cast<CodedPair*>(coded);
  int64_t used = layout.first();
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    // Where a pair lies is known once those before it are coded.
    static thread_local Scratch units_memory, numbers_memory;
    auto* units = units_memory.take<uint8_t>(layout.units_bytes(layout.units));
    auto* numbers = numbers_memory.take<int32_t>(layout.units + 1);
    failed |= units == nullptr || numbers == nullptr;
#pragma omp for ordered schedule(static, 1)
    for (long p = 0; p < layout.pairs; p++) {
      if (failed) continue;
      const PairOfPanels panels(weight, outputs, inputs, p);
      long plain = 0;
      uint8_t* unit = units;
      for (long u = 0; u < layout.units; u++) {
        if (panels.code(u, unit)) {
          unit += kUnitBytes;
        } else {
          panels.copy(u, reinterpret_cast<bf16*>(unit));
          unit += kPlainBytes;
          numbers[plain++] = static_cast<int32_t>(u);
        }
      }
      numbers[plain] = kNoUnit;
      const long size = layout.pair_bytes(plain);
      int64_t at;
#pragma omp ordered
      {
        at = used;
        used += size;
      }
      failed |= at + size > layout.bytes();
      if (failed) continue;
      uint8_t* to = static_cast<uint8_t*>(coded) + at;
      const int64_t distance = to - reinterpret_cast<uint8_t*>(pairs + p);
      pairs[p] = {distance, distance + layout.numbers_bytes(plain), {}};
      std::copy_n(panels.uppers(), kUpperBytes, pairs[p].uppers);
      std::memcpy(to, numbers, (plain + 1) * sizeof(int32_t));
      std::memcpy(to + layout.numbers_bytes(plain), units, layout.units_bytes(plain));
    }
  }
  return failed ? 0 : used;
}
