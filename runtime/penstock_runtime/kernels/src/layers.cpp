// Whole decoder layers in one call: what every kernel does for itself, in the order of the model.
//
// For a few rows the way from Python into the library and back costs more than some kernels do.
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
};

class Forward {
 public:
  Forward(const Step& step, const Between& between) : step_(step), between_(between) {}

  int run(const DecoderLayer& layer) const {
    if (multiply(layer.qkv, normed(layer.attention_norm), between_.qkv, false)) return 1;
    if (attend(layer)) return 1;
    const int64_t width = layer.output.inputs;
    if (multiply(layer.output, {between_.attended, width, Made::as_is, nullptr, 0}, step_.x, true)) {
      return 1;
    }
    if (multiply(layer.gate_up, normed(layer.mlp_norm), between_.gate_up, false)) return 1;
    const Source gated{between_.gate_up, layer.gate_up.outputs, Made::gated, nullptr, 0};
    if (multiply(layer.down, gated, step_.x, true)) return 1;
    round(step_.x);
    return 0;
  }

 private:
  Source normed(const float* weight) const {
    return {step_.x, step_.hidden, Made::normed, weight, step_.epsilon};
  }

  int multiply(const Matrix& by, const Source& source, float* y, bool accumulate) const {
    return linear({nullptr, 0, by.weight, by.kind, by.bias, y, step_.rows, by.outputs, by.inputs,
                   accumulate},
                  source);
  }

  int attend(const DecoderLayer& layer) const {
    AttentionInputs inputs = step_.inputs;
    inputs.qkv = between_.qkv;
    inputs.norm = layer.head_norm;
    inputs.kv = layer.kv;
    penstock_attention_inputs(&inputs);
    Attention attention = step_.attention;
    attention.q = between_.qkv;
    attention.q_stride = layer.qkv.outputs;
    attention.out = between_.attended;
    attention.kv = layer.kv;
    return penstock_attention(&attention);
  }

  // Activations between layers have the model's precision, so that stages may be cut anywhere.
  void round(float* x) const {
    if (step_.element == 1) round_to<bf16>(x);
    if (step_.element == 2) round_to<f16>(x);
  }

  template <class T>
  void round_to(float* x) const {
    const long count = step_.rows * step_.hidden;
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

}  // namespace
}  // namespace penstock

using namespace penstock;

int penstock_layers(const DecoderLayer* layers, int64_t count, const Step* step) {
  if (step->rows == 0 || count == 0) return 0;
  static thread_local Scratch qkv, attended, gate_up;
  const size_t rows = static_cast<size_t>(step->rows);
  const Between between{qkv.take<float>(rows * layers->qkv.outputs),
                        attended.take<float>(rows * layers->output.inputs),
                        gate_up.take<float>(rows * layers->gate_up.outputs)};
  if (!between.qkv || !between.attended || !between.gate_up) return 1;
  const Forward forward(*step, between);
  for (int64_t i = 0; i < count; i++) {
    if (forward.run(layers[i])) return 1;
  }
  return 0;
}
