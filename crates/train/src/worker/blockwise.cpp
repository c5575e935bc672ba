// Numbers in blocks that share a scale: NF4 weights (Dettmers et al., 2023) and 8-bit moments
// (Dettmers et al., 2022), with the tables and roundings of bitsandbytes. The other side of
// blockwise.rs.
//
// Knows nothing of models or layers. Results do not depend on the number of threads.

#include "blockwise.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "shim.h"

using at::Tensor;

namespace {

constexpr int64_t WEIGHTS = 64;   // a block of NF4
constexpr int64_t NUMBERS = 256;  // a block in 8 bits

// The quantiles of a normal distribution that bitsandbytes' functional.py lists.
constexpr std::array<float, 16> NF4 = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

using Table = std::array<float, 256>;

// Numbers of a dynamic exponent and fraction (Dettmers, 2016), ascending: seven decades of means
// of equal steps, with both signs or with one bit more of fraction.
Table dynamic(bool is_signed) {
  std::vector<float> all = {0, 1};
  for (int decade = 0; decade < 7; decade++) {
    const int64_t steps = (int64_t(1) << (decade + (is_signed ? 0 : 1))) + 1;
    const Tensor bounds = at::linspace(0.1, 1, steps);
    const Tensor means = (bounds.slice(0, 0, -1) + bounds.slice(0, 1)) / 2.0;
    const Tensor numbers = means * std::pow(10.0, decade - 6);
    for (int64_t i = 0; i < numbers.numel(); i++) {
      const float number = numbers.const_data_ptr<float>()[i];
      all.push_back(number);
      if (is_signed) all.push_back(-number);
    }
  }
  TORCH_CHECK(all.size() == 256, "the table has ", all.size(), " numbers");
  std::sort(all.begin(), all.end());
  Table table;
  std::copy(all.begin(), all.end(), table.begin());
  return table;
}

const Table& signed_table() {
  static const Table table = dynamic(true);
  return table;
}

const Table& unsigned_table() {
  static const Table table = dynamic(false);
  return table;
}

// Where one number of a table gives way to the next.
template <size_t N>
std::array<float, N - 1> bounds(const std::array<float, N>& table) {
  std::array<float, N - 1> between;
  for (size_t i = 0; i + 1 < N; i++) between[i] = (table[i] + table[i + 1]) / 2;
  return between;
}

template <size_t N>
uint8_t nearest(const std::array<float, N>& bounds, float x) {
  return uint8_t(std::lower_bound(bounds.begin(), bounds.end(), x) - bounds.begin());
}

float largest(const float* x, int64_t count) {
  float most = 0;
  for (int64_t i = 0; i < count; i++) most = std::max(most, std::fabs(x[i]));
  return most;
}

// A block in 8 bits. Returns its scale.
float to_bytes(const float* x, int64_t count, const std::array<float, 255>& bounds, uint8_t* to) {
  const float scale = largest(x, count);
  const float inverse = scale > 0 ? 1 / scale : 0;
  for (int64_t i = 0; i < count; i++) to[i] = nearest(bounds, x[i] * inverse);
  return scale;
}

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Blocks of 256 numbers to 8 bits each, and their scales.
std::pair<Tensor, Tensor> to_bytes(const Tensor& numbers, const Table& table) {
  const int64_t count = numbers.numel(), blocks = blocks_of(count, NUMBERS);
  Tensor bytes = at::empty({count}, at::kByte), scales = at::empty({blocks}, at::kFloat);
  const float* from = numbers.const_data_ptr<float>();
  uint8_t* to = bytes.mutable_data_ptr<uint8_t>();
  float* scale = scales.mutable_data_ptr<float>();
  const auto between = bounds(table);
  at::parallel_for(0, blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t at = block * NUMBERS, size = std::min(NUMBERS, count - at);
      scale[block] = to_bytes(from + at, size, between, to + at);
    }
  });
  return {bytes, scales};
}

// Numbers from bytes, on any device.
Tensor from_bytes(const Tensor& bytes, const Tensor& scales, const Tensor& table) {
  const Tensor each = scales.repeat_interleave(NUMBERS).slice(0, 0, bytes.numel());
  return table.index_select(0, bytes.to(at::kInt)).mul_(each);
}

// And back, into the same tensors.
void to_bytes(const Tensor& numbers, const Tensor& table, const Tensor& bytes,
              const Tensor& scales) {
  const int64_t padding = scales.numel() * NUMBERS - numbers.numel();
  const Tensor blocks = at::constant_pad_nd(numbers, {0, padding}).view({-1, NUMBERS});
  scales.copy_(blocks.abs().amax(1));
  const Tensor inverse = at::where(scales > 0, scales.reciprocal(), at::zeros_like(scales));
  const Tensor between = (table.slice(0, 0, -1) + table.slice(0, 1)) / 2.0;
  const Tensor nearest = at::bucketize(blocks * inverse.unsqueeze(1), between, /*out_int32=*/true);
  bytes.copy_(nearest.view({-1}).slice(0, 0, numbers.numel()));
}

// What AdamW does to one number.
struct AdamW {
  float divisor, beta1, rest1, beta2, rest2, eps, decay, correction2, rate;

  AdamW(float divisor, int64_t step, double rate, double beta1, double beta2, double eps,
        double weight_decay)
      : divisor(divisor),
        beta1(beta1),
        rest1(1 - beta1),
        beta2(beta2),
        rest2(1 - beta2),
        eps(eps),
        decay(1 - rate * weight_decay),
        correction2(std::sqrt(1 - std::pow(beta2, double(step)))),
        rate(rate / (1 - std::pow(beta1, double(step)))) {}

  void operator()(float& param, float grad, float& m, float& v) const {
    grad /= divisor;
    m = m * beta1 + grad * rest1;
    v = v * beta2 + grad * grad * rest2;
    param = param * decay - rate * (m / (std::sqrt(v) / correction2 + eps));
  }
};

// Both numbers of every byte.
const std::array<std::array<float, 2>, 256>& pairs() {
  static const auto table = [] {
    std::array<std::array<float, 2>, 256> pairs;
    for (int byte = 0; byte < 256; byte++) pairs[byte] = {NF4[byte >> 4], NF4[byte & 15]};
    return pairs;
  }();
  return table;
}

// A block's numbers.
template <typename T>
BEST_TARGET void unpack(const uint8_t* bytes, const std::array<float, 2>* pairs, float scale, T* to,
                        int64_t count) {
  int64_t i = 0;
  for (; i + 1 < count; i += 2, bytes++) {
    to[i] = T(pairs[*bytes][0] * scale);
    to[i + 1] = T(pairs[*bytes][1] * scale);
  }
  if (i < count) to[i] = T(pairs[*bytes][0] * scale);
}

template <typename T>
void unpack(const Nf4& weight, const Tensor& scales, Tensor& to) {
  const int64_t count = to.numel();
  const uint8_t* bytes = weight.packed.const_data_ptr<uint8_t>();
  const float* scale = scales.const_data_ptr<float>();
  const auto* both = pairs().data();
  T* out = to.mutable_data_ptr<T>();
  at::parallel_for(0, scales.numel(), 512, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t at = block * WEIGHTS, size = std::min(WEIGHTS, count - at);
      unpack(bytes + at / 2, both, scale[block], out + at, size);
    }
  });
}

Tensor on(const at::Device& device, const float* numbers, at::IntArrayRef shape) {
  return at::from_blob(const_cast<float*>(numbers), shape, at::kFloat).to(device, at::kFloat, false, true);
}

// Each block's scale.
Tensor scales_of(const Nf4& weight) {
  const Tensor table = on(weight.scales.device(), signed_table().data(), {256});
  const Tensor steps = weight.steps.repeat_interleave(NUMBERS).slice(0, 0, weight.scales.numel());
  return table.index_select(0, weight.scales.to(at::kInt)) * steps + weight.offset;
}

}  // namespace

Tensor nf4_dequantise(const Nf4& weight, int64_t rows, int64_t columns, at::ScalarType kind) {
  at::NoGradGuard no_grad;
  const Tensor scales = scales_of(weight);
  if (weight.packed.is_cpu()) {
    Tensor out = at::empty({rows, columns}, at::TensorOptions(kind));
    if (kind == at::kBFloat16) {
      unpack<at::BFloat16>(weight, scales, out);
    } else {
      TORCH_CHECK(kind == at::kFloat, "NF4 becomes float32 or bfloat16");
      unpack<float>(weight, scales, out);
    }
    return out;
  }
  // No kernel of ours: a look-up, and a product rounded once.
  const int64_t count = rows * columns, whole = count / WEIGHTS * WEIGHTS;
  const Tensor table = on(weight.packed.device(), pairs()[0].data(), {256, 2});
  const Tensor numbers =
      table.index_select(0, weight.packed.to(at::kInt)).view({-1}).slice(0, 0, count);
  Tensor out = at::empty({count}, numbers.options().dtype(kind));
  const int64_t blocks = whole / WEIGHTS;
  at::Tensor body = out.slice(0, 0, whole).view({blocks, WEIGHTS});
  body.copy_(numbers.slice(0, 0, whole).view({blocks, WEIGHTS}) *
             scales.slice(0, 0, blocks).unsqueeze(1));
  if (whole < count) out.slice(0, whole).copy_(numbers.slice(0, whole) * scales[blocks]);
  return out.view({rows, columns});
}

extern "C" {

// Four tensors into `out`, as Nf4 has them, from a float32 matrix on the processor.
int anneal_nf4_quantise(const Tensor* weight, Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const Tensor flat = weight->contiguous().view({-1});
    const int64_t count = flat.numel(), blocks = blocks_of(count, WEIGHTS);
    const float* from = flat.const_data_ptr<float>();
    Tensor packed = at::empty({(count + 1) / 2}, at::kByte), scales = at::empty({blocks}, at::kFloat);
    uint8_t* to = packed.mutable_data_ptr<uint8_t>();
    float* scale = scales.mutable_data_ptr<float>();
    const auto between = bounds(NF4);
    at::parallel_for(0, blocks, 64, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t at = block * WEIGHTS, size = std::min(WEIGHTS, count - at);
        scale[block] = largest(from + at, size);
        const float divisor = std::max(scale[block], 1e-38f), inverse = 1 / divisor;
        const auto number = [&](int64_t i) -> uint8_t {
          if (i >= size) return nearest(between, 0.0f);
          // bitsandbytes divides in the last block where it is not a whole one.
          const float x = size == WEIGHTS ? from[at + i] * inverse : from[at + i] / divisor;
          return nearest(between, std::clamp(x, -1.0f, 1.0f));
        };
        for (int64_t i = 0; i < size; i += 2) to[(at + i) / 2] = number(i) << 4 | number(i + 1);
      }
    });
    // One after another, whatever the number of threads.
    const c10::ParallelGuard serial(true);
    const Tensor offset = scales.mean();
    const auto [bytes, steps] = to_bytes(scales - offset, signed_table());
    const Tensor all[] = {packed, bytes, steps, offset};
    for (int i = 0; i < 4; i++) out[i] = new Tensor(all[i]);
  });
}

Tensor* anneal_nf4_dequantise(const Tensor* packed, const Tensor* scales, const Tensor* steps,
                              const Tensor* offset, int64_t rows, int64_t columns, int half) {
  return guarded([&] {
    return nf4_dequantise({*packed, *scales, *steps, *offset}, rows, columns,
                          half ? at::kBFloat16 : at::kFloat);
  });
}

// One step of AdamW over a parameter whose moments are held in 8 bits (Dettmers et al., 2022), from
// its gradient divided by a number. `step` counts from 1. Lets go of the gradient.
int anneal_adamw_8bit(const Tensor* param, const Tensor* first, const Tensor* first_scales,
                      const Tensor* second, const Tensor* second_scales, int64_t step,
                      const Tensor* divisor, double rate, double beta1, double beta2, double eps,
                      double weight_decay) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    Tensor flat = param->view({-1});
    const Tensor grads = param->grad().contiguous().view({-1});
    if (!param->is_cpu()) {
      const Tensor table1 = on(param->device(), signed_table().data(), {NUMBERS});
      const Tensor table2 = on(param->device(), unsigned_table().data(), {NUMBERS});
      const Tensor grad = grads / *divisor;
      const double correction1 = 1 - std::pow(beta1, double(step));
      const double correction2 = std::sqrt(1 - std::pow(beta2, double(step)));
      const Tensor m = from_bytes(*first, *first_scales, table1).mul_(beta1).add_(grad, 1 - beta1);
      const Tensor v =
          from_bytes(*second, *second_scales, table2).mul_(beta2).addcmul_(grad, grad, 1 - beta2);
      flat.mul_(1 - rate * weight_decay);
      flat.addcdiv_(m, (v.sqrt() / correction2).add_(eps), -rate / correction1);
      to_bytes(m, table1, *first, *first_scales);
      to_bytes(v, table2, *second, *second_scales);
    } else {
      const AdamW update(divisor->item<float>(), step, rate, beta1, beta2, eps, weight_decay);
      const int64_t count = flat.numel();
      float *p = flat.mutable_data_ptr<float>(), *scale1 = first_scales->mutable_data_ptr<float>();
      float* scale2 = second_scales->mutable_data_ptr<float>();
      const float* g = grads.const_data_ptr<float>();
      uint8_t *bytes1 = first->mutable_data_ptr<uint8_t>();
      uint8_t *bytes2 = second->mutable_data_ptr<uint8_t>();
      const Table &table1 = signed_table(), &table2 = unsigned_table();
      const auto bounds1 = bounds(table1), bounds2 = bounds(table2);
      at::parallel_for(0, first_scales->numel(), 16, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++) {
          const int64_t at = block * NUMBERS, size = std::min(NUMBERS, count - at);
          float m[NUMBERS], v[NUMBERS];
          for (int64_t i = 0; i < size; i++) {
            m[i] = table1[bytes1[at + i]] * scale1[block];
            v[i] = table2[bytes2[at + i]] * scale2[block];
            update(p[at + i], g[at + i], m[i], v[i]);
          }
          scale1[block] = to_bytes(m, size, bounds1, bytes1 + at);
          scale2[block] = to_bytes(v, size, bounds2, bytes2 + at);
        }
      });
    }
    param->mutable_grad() = Tensor();
  });
}

}  // extern "C"
