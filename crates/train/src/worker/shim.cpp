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
#include <string>
#include <vector>

using at::Tensor;
using TensorList = std::vector<Tensor>;

namespace {

thread_local std::string last_error;

template <typename F>
int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

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

// The sum of squares, the same whatever the number of threads: libtorch's own reduction to one
// number splits its input by the number of threads.
double square_sum(const Tensor& tensor) {
  constexpr int64_t CHUNK = 8192;
  const Tensor flat = tensor.contiguous();
  const float* x = flat.const_data_ptr<float>();
  const int64_t size = flat.numel(), chunks = (size + CHUNK - 1) / CHUNK;
  std::vector<double> sums(chunks);
  at::parallel_for(0, chunks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      const int64_t stop = std::min(size, (c + 1) * CHUNK);
      double lanes[8] = {0};
      int64_t i = c * CHUNK;
      for (; i + 8 <= stop; i += 8)
        for (int lane = 0; lane < 8; lane++) lanes[lane] += double(x[i + lane]) * x[i + lane];
      for (; i < stop; i++) lanes[0] += double(x[i]) * x[i];
      for (double lane : lanes) sums[c] += lane;
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

// Scales the parameters' gradients in place so that their common 2-norm is at most max_norm (0:
// any). Returns the norm as it was, a tensor of no dimensions: reading it is the only wait for the
// device. The formula is torch.nn.utils.clip_grad_norm_'s.
Tensor* anneal_clip_gradients(Tensor* const* params, int count, double max_norm) {
  Tensor* out = nullptr;
  guarded([&] {
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
    if (max_norm > 0) {
      at::_foreach_mul_(grads, at::clamp_max(max_norm / (norm + 1e-6), 1.0));
    }
    out = new Tensor(norm);
  });
  return out;
}

// One step of AdamW over parameters of one weight decay, by libtorch's fused kernel. steps counts
// the updates of each parameter. Lets go of the gradients.
int anneal_adamw(Tensor* const* params, Tensor* const* first, Tensor* const* second,
                 Tensor* const* steps, int count, double rate, double beta1, double beta2,
                 double eps, double weight_decay) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TensorList grads = gradients(params, count), all = list(params, count),
               m = list(first, count), v = list(second, count), step = list(steps, count);
    at::_foreach_add_(step, 1);
    at::_fused_adamw_(all, grads, m, v, /*max_exp_avg_sqs=*/{}, step, rate, beta1, beta2,
                      weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
    for (Tensor& param : all) param.mutable_grad() = Tensor();
  });
}

}  // extern "C"
