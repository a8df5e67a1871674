// Where the keys and values of a sequence lie.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "tile.h"

namespace penstock {

constexpr long kKeyBlock = 256;  // keys of one softmax, at absolute positions

// The part of a block that lies in one page, counted from the block's first token. A KV head's rows; the
// next one's are page_size rows behind.
template <class T>
struct Page {
  long first, tokens;
  const T* keys;
  const T* values;
};

template <class T>
struct Pages {
  long count = 0;
  Page<T> at[kKeyBlock];

  long tokens() const { return count == 0 ? 0 : at[count - 1].first + at[count - 1].tokens; }
};

template <class T>
Ahead ahead(const Evenly<T>& rows, long count) {
  return Ahead(rows.first, count * rows.stride * static_cast<long>(sizeof(T)));
}

// One sequence's, from one KV head on.
class PageTable {
 public:
  PageTable(const Attention& call, long segment, long kv_head)
      : kv_(call.kv), pages_(call.pages + call.first_pages[segment]), kv_head_(kv_head) {}

  // The block that begins at position `first`, up to `end`; none if it begins behind.
  template <class T>
  void find(long first, long end, Pages<T>& pages) const {
    pages.count = 0;
    const long tokens = std::min(kKeyBlock, end - first);
    for (long t = 0; t < tokens; t += pages.at[pages.count++].tokens) {
      const long position = first + t, place = position % kv_.page_size;
      const long page = pages_[position / kv_.page_size], row = kv_head_ * kv_.page_size + place;
      pages.at[pages.count] = {
          t, std::min(kv_.page_size - place, tokens - t),
          static_cast<const T*>(kv_.keys) + page * kv_.key_page_stride + row * kv_.key_stride,
          static_cast<const T*>(kv_.values) + page * kv_.value_page_stride + row * kv_.value_stride};
    }
  }

  // The rows of the KV head `head` behind the first, in a page.
  template <class T>
  Evenly<T> keys(const Page<T>& page, long head) const {
    return {page.keys + head * kv_.page_size * kv_.key_stride, kv_.key_stride};
  }
  template <class T>
  Evenly<T> values(const Page<T>& page, long head) const {
    return {page.values + head * kv_.page_size * kv_.value_stride, kv_.value_stride};
  }

  // The first head's part of every page, keys and values: two places a page.
  template <class T>
  void places(const Pages<T>& pages, Ahead* to) const {
    for (long p = 0; p < pages.count; p++) {
      to[2 * p] = ahead(keys(pages.at[p], 0), pages.at[p].tokens);
      to[2 * p + 1] = ahead(values(pages.at[p], 0), pages.at[p].tokens);
    }
  }

 private:
  const KvLayer& kv_;
  const int64_t* pages_;
  long kv_head_;
};

}  // namespace penstock
