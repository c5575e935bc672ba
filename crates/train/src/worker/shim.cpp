// What tch does not offer of libtorch, behind a C interface: the other side of shim.rs.
//
// Knows nothing of models or training steps. No exception leaves a function: those that can fail
// return null or a code, and keep the message for anneal_error.

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/version.h>

#include "shim.h"

using at::Tensor;

extern "C" {

const char* anneal_error() { return last_error.c_str(); }

const char* anneal_libtorch_version() { return TORCH_VERSION; }

// The most bytes that were held of a CUDA device at once; -1 where nobody tells.
int64_t anneal_peak_memory(int device) {
  using c10::CachingAllocator::StatType;
  int64_t peak = -1;
  guarded([&] {
    auto stats = c10::getDeviceAllocator(at::kCUDA)->getDeviceStats(c10::DeviceIndex(device));
    peak = stats.reserved_bytes[static_cast<size_t>(StatType::AGGREGATE)].peak;
  });
  return peak;
}

// Only operations whose result does not depend on the order in which threads arrive.
void anneal_deterministic(int strict) {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/!strict);
  at::globalContext().setDeterministicCuDNN(true);
  at::globalContext().setBenchmarkCuDNN(false);
  // On by default together with the above: it fills every new tensor with NaN.
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

// Goes back from `output`, whose gradient is given, and adds to the gradients of what it hangs on.
int anneal_backward(const Tensor* output, const Tensor* gradient) {
  return guarded([&] { torch::autograd::backward({*output}, {*gradient}); });
}

}  // extern "C"
