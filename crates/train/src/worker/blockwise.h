// Numbers in blocks that share a scale, for those who hold weights or moments so: blockwise.cpp.

#pragma once

#include <ATen/core/Tensor.h>

// NF4 as bitsandbytes lays it out: a matrix of 4-bit numbers.
struct Nf4 {
  at::Tensor packed;  // [n / 2], uint8: two numbers a byte, the first in the high half
  at::Tensor scales;  // [n / 64], uint8: each block's largest magnitude, itself in 8 bits
  at::Tensor steps;   // [n / 64 / 256], float32: the scale of 256 such scales
  at::Tensor offset;  // float32: the mean of all scales, taken off before they were rounded
};

// [rows, columns] in `kind`: products in float32, rounded once.
at::Tensor nf4_dequantise(const Nf4& weight, int64_t rows, int64_t columns, at::ScalarType kind);
