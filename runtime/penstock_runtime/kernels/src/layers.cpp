// Whole decoder layers in one call: what every kernel does for itself, in the order of the model.
//
// For a few rows the way from Python into the library and back costs more than some kernels do.
//
// Of the last layer only keys and values are wanted of most rows: of a prompt the last one chooses the
// next token, and behind a pipeline's last stage no row is wanted at all.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "linear.h"
#include "scratch.h"
#include "vector.h"

namespace penstock {
namespace {

// Memory between the kernels of a layer.
struct Between {
  float* qkv;
  float* attended;
  float* gate_up;
  float* rotations;       // of all rows
  float* last_rotations;  // of those wanted
};

// Rows that go through the layers, or through the last one.
struct Rows {
  float* x;  // (count, hidden)
  int64_t count;
};

class Forward {
 public:
  Forward(const Step& step, const Between& between) : step_(step), between_(between) {}

  int run(const DecoderLayer& layer) const {
    const Rows all{step_.x, step_.rows};
    if (layer.attention_norm != nullptr && run_attention(layer, all)) return 1;
    return layer.mlp_norm != nullptr && feed_forward(layer, all);
  }

  // Keys and values of all rows, everything else of those that are wanted.
  int run_last(const DecoderLayer& layer, const LastRows& last) const {
    const Rows all{step_.x, step_.rows}, wanted{last.x, last.count};
    const long heads = step_.attention.heads, width = heads * layer.kv.key_dim;
    const Matrix keys_values = columns(layer.qkv, width, layer.qkv.outputs - width);
    if (multiply(keys_values, normed(all, layer.attention_norm), all, between_.qkv, false)) return 1;
    AttentionInputs inputs = step_.inputs;
    inputs.qkv = between_.qkv;
    inputs.heads = 0;
    inputs.norm = layer.head_norm == nullptr ? nullptr : layer.head_norm + width;
    inputs.kv = layer.kv;
    inputs.rotations = between_.rotations;
    penstock_attention_inputs(&inputs);
    if (wanted.count == 0) return 0;

    for (long r = 0; r < wanted.count; r++) {
      std::copy_n(all.x + last.rows[r] * step_.hidden, step_.hidden, wanted.x + r * step_.hidden);
    }
    const Matrix queries = columns(layer.qkv, 0, width);
    if (multiply(queries, normed(wanted, layer.attention_norm), wanted, between_.qkv, false)) return 1;
    inputs.rows = wanted.count;
    inputs.heads = heads;
    inputs.norm = layer.head_norm;
    inputs.rotations = between_.last_rotations;
    inputs.kv.kv_heads = 0;  // theirs are written
    penstock_attention_inputs(&inputs);
    return attend(layer, last.attention, width, wanted) || feed_forward(layer, wanted);
  }

 private:
  int run_attention(const DecoderLayer& layer, const Rows& all) const {
    if (multiply(layer.qkv, normed(all, layer.attention_norm), all, between_.qkv, false)) return 1;
    AttentionInputs inputs = step_.inputs;
    inputs.qkv = between_.qkv;
    inputs.norm = layer.head_norm;
    inputs.rotations = between_.rotations;
    inputs.kv = layer.kv;
    penstock_attention_inputs(&inputs);
    return attend(layer, step_.attention, layer.qkv.outputs, all);
  }

  Source normed(const Rows& rows, const float* weight) const {
    return {rows.x, step_.hidden, Made::normed, weight, step_.epsilon};
  }

  int multiply(const Matrix& by, const Source& source, const Rows& rows, float* y,
               bool accumulate) const {
    return linear(product(by, rows, y, accumulate), source);
  }

  static Linear product(const Matrix& by, const Rows& rows, float* y, bool accumulate) {
    return {nullptr, 0, by.weight, by.kind, by.bias, y, rows.count, by.outputs, by.inputs, accumulate};
  }

  // Adds attention to x; queries lie in rows of `width`.
  int attend(const DecoderLayer& layer, Attention call, long width, const Rows& rows) const {
    call.q = between_.qkv;
    call.q_stride = width;
    call.out = between_.attended;
    call.kv = layer.kv;
    if (penstock_attention(&call)) return 1;
    const Source attended{between_.attended, layer.output.inputs, Made::as_is, nullptr, 0};
    if (multiply(layer.output, attended, rows, rows.x, true)) return 1;
    round(rows);
    return 0;
  }

  int feed_forward(const DecoderLayer& layer, const Rows& rows) const {
    if (gated_linear(product(layer.gate_up, rows, between_.gate_up, false), normed(rows, layer.mlp_norm),
                     product(layer.down, rows, rows.x, true))) {
      return 1;
    }
    round(rows);
    return 0;
  }

  // Hidden states have the model's precision behind each half, so that stages may be cut anywhere.
  void round(const Rows& rows) const {
    if (step_.element == 1) round_to<bf16>(rows.x, rows.count * step_.hidden);
    if (step_.element == 2) round_to<f16>(rows.x, rows.count * step_.hidden);
  }

  template <class T>
  void round_to(float* x, long count) const {
#pragma omp parallel for schedule(static) if (count > (1 << 14))
    for (long i = 0; i < count; i++) {
      T narrowed;
      narrow(x[i], &narrowed);
      x[i] = widen(narrowed);
    }
  }

  const Step& step_;
  const Between& between_;
};

// Angles are float32, as in the implementations that models were trained with: at a million tokens their
// error is 0.06 radians in the fastest pair. What is made of them is rounded from double, so that it is the
// same in every library of mathematics: `rotations` in rope.py does likewise.
void rotations(const Step& step, long pairs, float* to) {
#pragma omp parallel for schedule(static) if (step.rows * pairs > (1 << 10))
  for (long row = 0; row < step.rows; row++) {
    const float position = static_cast<float>(step.positions[row]);
    for (long i = 0; i < pairs; i++) {
      const double angle = position * step.frequencies[i];
      float* pair = to + 2 * (row * pairs + i);
      pair[0] = static_cast<float>(step.magnitude * std::cos(angle));
      pair[1] = static_cast<float>(step.magnitude * std::sin(angle));
    }
  }
}

}  // namespace
}  // namespace penstock

using namespace penstock;

int penstock_layers(const DecoderLayer* layers, int64_t count, const Step* step) {
  if (step->rows == 0 || count == 0) return 0;
  static thread_local Scratch qkv, attended, gate_up, turns, last_turns;
  const size_t rows = static_cast<size_t>(step->rows);
  const size_t wanted = step->last == nullptr ? 0 : static_cast<size_t>(step->last->count);
  // The last layer has an attention, and the first one a feed-forward if any has.
  const DecoderLayer &front = layers[0], &back = layers[count - 1];
  const Between between{qkv.take<float>(rows * back.qkv.outputs),
                        attended.take<float>(rows * back.output.inputs),
                        gate_up.take<float>(std::max<size_t>(1, rows * front.gate_up.outputs)),
                        turns.take<float>(rows * back.kv.key_dim),
                        last_turns.take<float>(std::max<size_t>(1, wanted * back.kv.key_dim))};
  if (!between.qkv || !between.attended || !between.gate_up || !between.rotations ||
      !between.last_rotations) {
    return 1;
  }
  rotations(*step, back.kv.key_dim / 2, between.rotations);
  for (size_t r = 0; r < wanted; r++) {
    std::copy_n(between.rotations + step->last->rows[r] * back.kv.key_dim, back.kv.key_dim,
                between.last_rotations + r * back.kv.key_dim);
  }
  const Forward forward(*step, between);
  const int64_t whole = step->last == nullptr ? count : count - 1;
  for (int64_t i = 0; i < whole; i++) {
    if (forward.run(layers[i])) return 1;
  }
  return step->last == nullptr ? 0 : forward.run_last(layers[whole], *step->last);
}
