// What tch does not offer of libtorch, behind a C interface: the other side of shim.rs.
//
// Knows nothing of models or training steps. No exception leaves a function: those that can fail
// return null or a code, and keep the message for anneal_error.

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <torch/version.h>

#include <cmath>
#include <vector>

#include "shim.h"

using at::Tensor;
using TensorList = std::vector<Tensor>;

namespace {

TensorList list(Tensor* const* tensors, int count) {
  TensorList out;
  out.reserve(count);
  for (int i = 0; i < count; i++) out.push_back(*tensors[i]);
  return out;
}

TensorList gradients(Tensor* const* params, int count) {
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

}  // namespace

extern "C" {

const char* anneal_error() { return last_error.c_str(); }

const char* anneal_libtorch_version() { return TORCH_VERSION; }

// Only operations whose result does not depend on the order in which threads arrive.
void anneal_deterministic(int strict) {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/!strict);
  at::globalContext().setDeterministicCuDNN(true);
  at::globalContext().setBenchmarkCuDNN(false);
  // On by default together with the above: it fills every new tensor with NaN.
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

// The common 2-norm of the parameters' gradients, and what to divide them by so that it is at most
// max_norm (0: any), as torch.nn.utils.clip_grad_norm_ has it. A tensor of two elements: reading it
// is the only wait for the device.
Tensor* anneal_gradient_norm(Tensor* const* params, int count, double max_norm) {
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
int anneal_adamw(Tensor* const* params, Tensor* const* first, Tensor* const* second,
                 Tensor* const* steps, int count, const Tensor* divisor, double rate, double beta1,
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

}  // extern "C"
