// Parts of a transformer layer as one operation each, forwards and backwards: the other side of
// fused.rs. In libtorch they are chains of operations, each of which allocates, dispatches, and
// passes over memory; on a processor that is half of a small model's time.
//
// Knows nothing of models. Tensors are float32; those of the loops written out here are contiguous
// and on the CPU. Results do not depend on the number of threads: rows are divided among them, and
// sums over rows are cut at fixed places.

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "blockwise.h"
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

using Maybe = std::optional<Tensor>;

// A frozen matrix [out, in], as it is or in NF4, in the kind that it is asked for.
struct Frozen {
  Tensor weight;  // itself, or packed
  Tensor scales, steps, offset;

  Tensor of(int64_t rows, int64_t columns, at::ScalarType kind) const {
    if (!scales.defined()) return weight.to(kind);
    return nf4_dequantise({weight, scales, steps, offset}, rows, columns, kind);
  }
};

// lowbias32 of Wellons's hash-prospector: every bit of the result hangs on every bit of x.
INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 16;
}

BEST_TARGET void drop(const float* x, float* y, int64_t count, uint32_t key, uint32_t least,
                      float scale) {
  for (int64_t i = 0; i < count; i++) y[i] = mixed(uint32_t(i) ^ key) < least ? 0 : x[i] * scale;
}

// x, float32, with each number dropped by a chance that the seed decides, the others larger for it.
Tensor dropped(const Tensor& x, double dropout, int64_t seed) {
  if (dropout == 0) return x;
  const double scale = 1 / (1 - dropout);
  if (!x.is_cpu()) {
    at::Generator chance = at::globalContext().defaultGenerator(x.device()).clone();
    chance.set_current_seed(seed);
    return at::mul(x, at::empty_like(x, at::kBool).bernoulli_(1 - dropout, chance)).mul_(scale);
  }
  // A hash of each place: libtorch's generator takes one number after another, 20 ns each.
  const Tensor whole = x.contiguous();
  const int64_t width = x.size(-1), rows = x.numel() / width;
  Tensor y = at::empty_like(whole);
  const float* from = data(std::as_const(whole));
  float* to = data(y);
  const uint32_t least = uint32_t(dropout * 4294967296.0), high = uint32_t(uint64_t(seed) >> 32);
  at::parallel_for(0, rows, ROWS_A_CHUNK, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const uint32_t key = mixed(mixed(uint32_t(row) ^ uint32_t(seed)) + high);
      drop(from + row * width, to + row * width, width, key, least, float(scale));
    }
  });
  return y;
}

// y = x·Wᵀ + bias + scale · (dropped x·Aᵀ)·Bᵀ with a frozen W.
//
// A and B are float32. Where x is not, it is taken up to float32 for them, added to there, and
// rounded once, as PEFT does; but what is kept for the way back is x itself: neither the copy in
// float32 nor a W out of NF4, nor which numbers were dropped, which is found out again. (As masks
// they would take little, but lie between the large tensors, so that nothing large fits there.)
struct FrozenLinear : torch::autograd::Function<FrozenLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const Maybe& scales, const Maybe& steps, const Maybe& offset,
                        const Maybe& bias, const Maybe& a, const Maybe& b, int64_t out,
                        double scale, double dropout) {
    const at::ScalarType kind = x.scalar_type();
    const Frozen frozen{weight, scales.value_or(Tensor()), steps.value_or(Tensor()),
                        offset.value_or(Tensor())};
    // What stays is allocated before what goes again: else it would lie in the middle of the room
    // that is left, and nothing large would fit there.
    Tensor y = at::empty({x.size(0), out}, x.options()), inner;
    if (a) inner = at::empty({x.size(0), a->size(0)}, a->options());
    {
      const Tensor dense = frozen.of(out, x.size(1), kind);
      if (bias && kind != at::kFloat) {
        at::addmm_out(y, bias->to(kind), x, dense.t());
      } else {
        at::mm_out(y, x, dense.t());
      }
    }
    if (a) {
      const int64_t most = std::numeric_limits<int64_t>::max();
      const int64_t seed = dropout > 0 ? at::randint(most, {}, at::kLong).item<int64_t>() : 0;
      context->saved_data["seed"] = seed;
      at::mm_out(inner, dropped(x.to(at::kFloat), dropout, seed), a->t());
    }
    if (kind == at::kFloat) {
      if (b) y.addmm_(inner, b->t(), 1, scale);
      if (bias) y.add_(*bias);
    } else if (b) {
      y.copy_(y.to(at::kFloat) + at::mm(inner, b->t()) * scale);
    }
    context->save_for_backward({x, weight, frozen.scales, frozen.steps, frozen.offset,
                                a.value_or(Tensor()), b.value_or(Tensor()), inner});
    context->saved_data["scale"] = scale;
    context->saved_data["dropout"] = dropout;
    context->saved_data["out"] = out;
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &a = saved[5], &b = saved[6], &inner = saved[7];
    const Tensor& dy = grads[0];
    const double scale = context->saved_data["scale"].toDouble();
    const double dropout = context->saved_data["dropout"].toDouble();
    // The same numbers are dropped each time.
    const auto again = [&](const Tensor& t) {
      return dropped(t, dropout, context->saved_data["seed"].toInt());
    };

    Tensor d_inner, da, db, dx;
    if (a.defined()) {
      const Tensor wide = dy.to(at::kFloat);
      d_inner = at::mm(wide, b).mul_(scale);
      db = at::mm(wide.t(), inner).mul_(scale);
      da = at::mm(d_inner.t(), again(x.to(at::kFloat)));
    }
    if (context->needs_input_grad(0)) {
      const int64_t out = context->saved_data["out"].toInt();
      const Frozen frozen{saved[1], saved[2], saved[3], saved[4]};
      dx = at::mm(dy, frozen.of(out, x.size(1), x.scalar_type()));
      if (a.defined() && x.scalar_type() == at::kFloat && dropout == 0) {
        dx.addmm_(d_inner, a);
      } else if (a.defined()) {
        dx = (dx.to(at::kFloat) + again(at::mm(d_inner, a))).to(x.scalar_type());
      }
    }
    const Tensor none;
    return {dx, none, none, none, none, none, da, db, none, none, none};
  }
};

INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Between bfloat16 and float32, without at::BFloat16's care for NaN, over which no loop becomes
// vector instructions.
INLINE float wide(uint16_t half) { return from_bits(uint32_t(half) << 16); }
INLINE uint16_t narrow(float x) {
  const uint32_t bits = to_bits(x);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// eˣ for x ≤ 0, to a unit in the last place: 2ⁿ · eʳ with |r| ≤ ln 2 / 2, by Cephes' polynomial
// (expf.c). Adding 1.5 · 2²³ rounds to a whole n, and leaves it in the lowest bits.
INLINE float exp_below(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return from_bits(to_bits(p * r * r + r + 1) + (to_bits(shifted) << 23));
}

// A row of logits in bfloat16 becomes the gradient of share · -ln p(target), in place. Returns
// -ln p(target).
BEST_TARGET float softmax_row(uint16_t* row, int64_t size, int64_t target, float share) {
  const int64_t whole = size / LANES * LANES;
  float most[LANES], sums[LANES] = {0};
  std::fill(most, most + LANES, -INFINITY);
  for (int64_t i = 0; i < whole; i += LANES)
    for (int lane = 0; lane < LANES; lane++) {
      const float x = wide(row[i + lane]);
      most[lane] = x > most[lane] ? x : most[lane];
    }
  for (int64_t i = whole; i < size; i++) most[0] = std::max(most[0], wide(row[i]));
  const float largest = *std::max_element(most, most + LANES), at = wide(row[target]) - largest;
  for (int64_t i = 0; i < whole; i += LANES)
    for (int lane = 0; lane < LANES; lane++) sums[lane] += exp_below(wide(row[i + lane]) - largest);
  for (int64_t i = whole; i < size; i++) sums[0] += exp_below(wide(row[i]) - largest);
  const float total = sum(sums), scale = share / total;
  for (int64_t i = 0; i < size; i++) row[i] = narrow(exp_below(wide(row[i]) - largest) * scale);
  row[target] = narrow(exp_below(at) * scale - share);
  return std::log(total) - at;
}

// Of all rows of a tile of logits, on the processor.
Tensor softmax_rows(Tensor& logits, const Tensor& targets, const Tensor& shares) {
  const int64_t rows = logits.size(0), size = logits.size(1);
  Tensor miss = at::empty({rows}, shares.options());
  uint16_t* from = reinterpret_cast<uint16_t*>(logits.mutable_data_ptr<at::BFloat16>());
  const Tensor which = targets.contiguous(), share = shares.contiguous();
  const int64_t* target = which.const_data_ptr<int64_t>();
  const float* of = data(share);
  float* to = data(miss);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      to[row] = softmax_row(from + row * size, size, target[row], of[row]);
  });
  return miss;
}

// Σᵢ weightᵢ · -ln p(targetᵢ | xᵢ) / divisor, where p is the softmax of x·Wᵀ in float32.
//
// So many rows at a time as their logits come to `tile` numbers: with a vocabulary of 262,144 all
// of them would be most of a step's memory. The gradients are made along with the loss, while a
// tile's logits are there.
struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const Tensor& targets, const Tensor& weights, double divisor, int64_t tile,
                        bool training) {
    const int64_t count = x.size(0), step = std::max<int64_t>(1, tile / weight.size(0));
    const bool of_x = training && x.requires_grad(), of_weight = training && weight.requires_grad();
    const Tensor loss = at::zeros({}, weights.options());
    const Tensor share = at::ones({}, weights.options()).div_(divisor);
    Tensor dx, dw;
    if (of_x && count > step) dx = at::empty_like(x);
    for (int64_t first = 0; first < count; first += step) {
      const int64_t last = std::min(first + step, count);
      const auto part = [&](const Tensor& t) { return t.slice(0, first, last); };
      const Tensor rows = part(x);
      Tensor d = at::mm(rows, weight.t());
      if (d.is_cpu() && d.scalar_type() == at::kBFloat16) {
        const Tensor miss = softmax_rows(d, part(targets), share * part(weights));
        loss.add_(miss.dot(part(weights)));
        if (!of_x && !of_weight) continue;
      } else {
        // In place: there are never more than two tiles, the logarithms and their gradient.
        Tensor log_p = d.to(at::kFloat);
        at::_log_softmax_out(log_p, log_p, 1, /*half_to_float=*/false);
        const auto [miss, total] =
            at::nll_loss_forward(log_p, part(targets), {}, at::Reduction::None, -100);
        loss.add_(miss.dot(part(weights)));
        if (!of_x && !of_weight) continue;
        d = at::nll_loss_backward(share * part(weights), log_p, part(targets), {},
                                  at::Reduction::None, -100, total);
        at::_log_softmax_backward_data_out(d, d, log_p, 1, at::kFloat);
        d = d.to(x.scalar_type());
      }
      if (of_x && dx.defined()) part(dx).copy_(at::mm(d, weight));
      if (of_x && !dx.defined()) dx = at::mm(d, weight);
      if (of_weight && dw.defined()) dw.addmm_(d.t(), rows);
      if (of_weight && !dw.defined()) dw = at::mm(d.t(), rows);
    }
    if (dx.defined()) context->saved_data["dx"] = dx;
    if (dw.defined()) context->saved_data["dw"] = dw;
    return loss.div_(divisor);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto scaled = [&](const char* name) {
      const auto found = context->saved_data.find(name);
      return found == context->saved_data.end() ? Tensor() : found->second.toTensor().mul_(grads[0]);
    };
    const Tensor none;
    return {scaled("dx"), scaled("dw"), none, none, none, none, none};
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

// Tensors that may be null: scales, steps and offset (of NF4) together, bias, a and b together.
Tensor* anneal_frozen_linear(const Tensor* x, const Tensor* weight, const Tensor* scales,
                             const Tensor* steps, const Tensor* offset, const Tensor* bias,
                             const Tensor* a, const Tensor* b, int64_t out, double scale,
                             double dropout) {
  return guarded([&] {
    const auto given = [](const Tensor* tensor) { return tensor ? Maybe(*tensor) : Maybe(); };
    return FrozenLinear::apply(*x, *weight, given(scales), given(steps), given(offset), given(bias),
                               given(a), given(b), out, scale, dropout);
  });
}

Tensor* anneal_cross_entropy(const Tensor* x, const Tensor* weight, const Tensor* targets,
                             const Tensor* weights, double divisor, int64_t tile) {
  return guarded([&] {
    const bool training = at::GradMode::is_enabled();
    return CrossEntropy::apply(*x, *weight, *targets, *weights, divisor, tile, training);
  });
}

}  // extern "C"
