// What an optimiser does to parameters, once their gradients are there: the other side of update.rs.
//
// Knows nothing of models or schedules. Results do not depend on the number of threads.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "shim.h"

using at::Tensor;
using TensorList = std::vector<Tensor>;

namespace {

TensorList list(const Tensor* const* tensors, int count) {
  TensorList out;
  out.reserve(count);
  for (int i = 0; i < count; i++) out.push_back(*tensors[i]);
  return out;
}

TensorList gradients(const Tensor* const* params, int count) {
  TensorList out;
  out.reserve(count);
  for (int i = 0; i < count; i++) {
    TORCH_CHECK(params[i]->grad().defined(), "parameter ", i, " has no gradient");
    out.push_back(params[i]->grad());
  }
  return out;
}

BEST_TARGET double square_sum(const float* x, int64_t size) {
  constexpr int LANES = 8;
  double lanes[LANES] = {0}, total = 0;
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] += double(x[i + lane]) * x[i + lane];
  for (; i < size; i++) total += double(x[i]) * x[i];
  for (double lane : lanes) total += lane;
  return total;
}

// The same whatever the number of threads: libtorch's own reduction to one number splits its input
// by the number of threads.
double square_sum(const Tensor& tensor) {
  constexpr int64_t CHUNK = 8192;
  const Tensor flat = tensor.contiguous();
  const float* x = flat.const_data_ptr<float>();
  const int64_t size = flat.numel(), chunks = (size + CHUNK - 1) / CHUNK;
  std::vector<double> sums(chunks);
  at::parallel_for(0, chunks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t first = chunk * CHUNK;
      sums[chunk] = square_sum(x + first, std::min(CHUNK, size - first));
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// √(mean x²), of no dimensions.
Tensor root_mean_square(const Tensor& x) {
  if (!x.is_cpu()) return x.square().mean().sqrt();
  return at::scalar_tensor(std::sqrt(square_sum(x) / double(x.numel())), x.options());
}

}  // namespace

extern "C" {

// The common 2-norm of the parameters' gradients, and what to divide them by so that it is at most
// max_norm (0: any), as torch.nn.utils.clip_grad_norm_ has it. A tensor of two elements: reading it
// is the only wait for the device.
Tensor* anneal_gradient_norm(const Tensor* const* params, int count, double max_norm) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TensorList grads = gradients(params, count);
    Tensor norm;
    if (grads.at(0).is_cpu()) {
      double total = 0;
      for (const Tensor& grad : grads) total += square_sum(grad);
      norm = at::scalar_tensor(std::sqrt(total), grads[0].options());
    } else {
      norm = at::linalg_vector_norm(at::stack(at::_foreach_norm(grads, 2)), 2);
    }
    const Tensor divisor =
        max_norm > 0 ? at::clamp_min((norm + 1e-6) / max_norm, 1.0) : at::ones_like(norm);
    return at::stack({norm, divisor});
  });
}

// One step of AdamW over parameters of one weight decay, by libtorch's fused kernel, from their
// gradients divided by a number. steps counts the updates of each parameter. Lets go of the
// gradients.
int anneal_adamw(const Tensor* const* params, const Tensor* const* first, const Tensor* const* second,
                 const Tensor* const* steps, int count, const Tensor* divisor, double rate, double beta1,
                 double beta2, double eps, double weight_decay) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TensorList grads = gradients(params, count), all = list(params, count),
               m = list(first, count), v = list(second, count), step = list(steps, count);
    at::_foreach_add_(step, 1);
    at::_fused_adamw_(all, grads, m, v, /*max_exp_avg_sqs=*/{}, step, rate, beta1, beta2,
                      weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false,
                      /*grad_scale=*/*divisor);
    for (Tensor& param : all) param.mutable_grad() = Tensor();
  });
}

// One step of Adafactor (Shazeer & Stern, 2018) as transformers' Adafactor takes it with a learning
// rate of its own: no first moment, no scaling by the parameter. The second moment is that of
// `rows` and `columns`, or where those are null of every number in `second`. `step` counts from 1.
// Lets go of the gradient.
int anneal_adafactor(const Tensor* param, const Tensor* rows, const Tensor* columns,
                     const Tensor* second, int64_t step, const Tensor* divisor, double rate,
                     double weight_decay) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const double keep = 1 - std::pow(double(step), -0.8);
    const Tensor grad = param->grad() / *divisor;
    Tensor update = grad.square().add_(1e-30);
    if (rows) {
      // A mean over all of a tensor would be cut by the number of threads.
      const c10::ParallelGuard serial(true);
      rows->mul_(keep).add_(update.mean(-1), 1 - keep);
      columns->mul_(keep).add_(update.mean(-2), 1 - keep);
      const Tensor of_rows = rows->div(rows->mean(-1, /*keepdim=*/true)).rsqrt_();
      update = of_rows.unsqueeze(-1).mul(columns->rsqrt().unsqueeze(-2)).mul_(grad);
    } else {
      second->mul_(keep).add_(update, 1 - keep);
      update = second->rsqrt().mul_(grad);
    }
    update.div_(root_mean_square(update).clamp_min_(1.0)).mul_(rate);
    if (weight_decay > 0) param->mul_(1 - weight_decay * rate);
    param->sub_(update);
    param->mutable_grad() = Tensor();
  });
}

}  // extern "C"
