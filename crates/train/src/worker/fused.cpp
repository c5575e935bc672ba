// Parts of a transformer layer as one operation each, forwards and backwards: the other side of
// fused.rs. In libtorch they are chains of operations, each of which allocates, dispatches, and
// passes over memory; on a processor that is half of a small model's time.
//
// Knows nothing of models. Tensors are float32; those of the loops written out here are contiguous
// and on the CPU. Results do not depend on the number of threads: rows are divided among them, and
// sums over rows are cut at fixed places.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <vector>

#include "shim.h"

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

constexpr int LANES = 16;
constexpr int64_t ROWS_A_CHUNK = 32;

float* data(Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }
const float* data(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

float sum(const float* lanes) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
  return total;
}

// y = w · x · scale with scale = 1 / √(mean x² + eps), for each row.
BEST_TARGET void rms_norm(const float* x, const float* w, float* y, float* scales, int64_t rows,
                          int64_t width, float eps) {
  for (int64_t row = 0; row < rows; row++, x += width, y += width) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
      for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane] * x[i + lane];
    for (; i < width; i++) lanes[0] += x[i] * x[i];
    const float scale = 1 / std::sqrt(sum(lanes) / width + eps);
    for (i = 0; i < width; i++) y[i] = w[i] * (x[i] * scale);
    scales[row] = scale;
  }
}

// Of the above: dx, and the rows' share of dw, which is added to what is there.
BEST_TARGET void rms_norm_backward(const float* x, const float* w, const float* scales,
                                   const float* dy, float* dx, float* dw, int64_t rows,
                                   int64_t width) {
  for (int64_t row = 0; row < rows; row++, x += width, dy += width, dx += width) {
    const float scale = scales[row];
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
      for (int lane = 0; lane < LANES; lane++)
        lanes[lane] += dy[i + lane] * w[i + lane] * x[i + lane];
    for (; i < width; i++) lanes[0] += dy[i] * w[i] * x[i];
    const float along = sum(lanes) * scale * scale / width;
    for (i = 0; i < width; i++) dx[i] = scale * (dy[i] * w[i] - along * x[i]);
    if (dw)
      for (i = 0; i < width; i++) dw[i] += dy[i] * x[i] * scale;
  }
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        double eps) {
    const int64_t width = x.size(-1), rows = x.numel() / width;
    Tensor y = at::empty_like(x), scales = at::empty({rows}, x.options());
    const float *from = data(x), *w = data(weight);
    float *to = data(y), *scale = data(scales);
    at::parallel_for(0, rows, ROWS_A_CHUNK, [&](int64_t begin, int64_t end) {
      rms_norm(from + begin * width, w, to + begin * width, scale + begin, end - begin, width,
               float(eps));
    });
    context->save_for_backward({x, weight, scales});
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &scales = saved[2], dy = grads[0].contiguous();
    const int64_t width = x.size(-1), rows = x.numel() / width;
    const int64_t chunks = (rows + ROWS_A_CHUNK - 1) / ROWS_A_CHUNK;
    const bool trained = context->needs_input_grad(1);
    Tensor dx = at::empty_like(x);
    Tensor dw = trained ? at::zeros({chunks, width}, x.options()) : Tensor();
    const float *from = data(x), *w = data(weight), *scale = data(scales), *gradient = data(dy);
    float *to = data(dx), *sums = trained ? data(dw) : nullptr;
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t first = chunk * ROWS_A_CHUNK, count = std::min(ROWS_A_CHUNK, rows - first);
        const int64_t at = first * width;
        rms_norm_backward(from + at, w, scale + first, gradient + at, to + at,
                          trained ? sums + chunk * width : nullptr, count, width);
      }
    });
    for (int64_t chunk = 1; trained && chunk < chunks; chunk++)
      for (int64_t i = 0; i < width; i++) sums[i] += sums[chunk * width + i];
    return {dx, trained ? dw[0] : Tensor(), Tensor()};
  }
};

// Turns the two halves of each head against each other, by the angle of the row's position, or
// back again (sign -1).
BEST_TARGET void rotate(const float* x, const float* cos, const float* sin, float* y,
                        int64_t begin, int64_t end, int64_t positions, int64_t heads, int64_t size,
                        float sign) {
  const int64_t half = size / 2;
  for (int64_t row = begin; row < end; row++) {
    const float *c = cos + row % positions * size, *s = sin + row % positions * size;
    for (int64_t head = 0; head < heads; head++) {
      const float* from = x + (row * heads + head) * size;
      float* to = y + (row * heads + head) * size;
      for (int64_t i = 0; i < half; i++) {
        // The tables repeat: both halves have the same angles.
        to[i] = from[i] * c[i] - sign * from[i + half] * s[i];
        to[i + half] = from[i + half] * c[i] + sign * from[i] * s[i];
      }
    }
  }
}

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin, float sign) {
  const int64_t positions = cos.size(0), size = cos.size(1), heads = x.size(-1) / size;
  const int64_t rows = x.numel() / x.size(-1);
  Tensor y = at::empty_like(x);
  const float *from = data(x), *c = data(cos), *s = data(sin);
  float* to = data(y);
  at::parallel_for(0, rows, ROWS_A_CHUNK, [&](int64_t begin, int64_t end) {
    rotate(from, c, s, to, begin, end, positions, heads, size, sign);
  });
  return y;
}

struct Rotate : torch::autograd::Function<Rotate> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& cos,
                        const Tensor& sin) {
    context->save_for_backward({cos, sin});
    return rotated(x, cos, sin, 1);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    return {rotated(grads[0].contiguous(), saved[0], saved[1], -1), Tensor(), Tensor()};
  }
};

// y = x·Wᵀ + scale · (x·Aᵀ)·Bᵀ, all of it in products that add to what is there.
struct LoraLinear : torch::autograd::Function<LoraLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const Tensor& a, const Tensor& b, double scale) {
    const Tensor inner = at::mm(x, a.t());
    Tensor y = at::mm(x, weight.t());
    y.addmm_(inner, b.t(), 1, scale);
    context->save_for_backward({x, weight, a, b, inner});
    context->saved_data["scale"] = scale;
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &a = saved[2], &b = saved[3];
    const Tensor &inner = saved[4], &dy = grads[0];
    const double scale = context->saved_data["scale"].toDouble();
    const Tensor d_inner = at::mm(dy, b).mul_(scale);
    const Tensor db = at::mm(dy.t(), inner).mul_(scale), da = at::mm(d_inner.t(), x);
    Tensor dx;
    if (context->needs_input_grad(0)) {
      dx = at::mm(dy, weight);
      dx.addmm_(d_inner, a);
    }
    return {dx, Tensor(), da, db, Tensor()};
  }
};

}  // namespace

extern "C" {

Tensor* anneal_rms_norm(const Tensor* x, const Tensor* weight, double eps) {
  return guarded([&] { return RmsNorm::apply(x->contiguous(), *weight, eps); });
}

Tensor* anneal_rotate(const Tensor* x, const Tensor* cos, const Tensor* sin) {
  return guarded([&] {
    return Rotate::apply(x->contiguous(), cos->contiguous(), sin->contiguous());
  });
}

Tensor* anneal_lora_linear(const Tensor* x, const Tensor* weight, const Tensor* a, const Tensor* b,
                           double scale) {
  return guarded([&] { return LoraLinear::apply(*x, *weight, *a, *b, scale); });
}

}  // extern "C"
