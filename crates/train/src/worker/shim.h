// What the C++ sources share: how an exception of libtorch's reaches Rust, as a message and a null
// pointer or a code, and how loops are compiled.

#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <exception>
#include <string>
#include <type_traits>

inline thread_local std::string last_error;

// Runs `body`. A tensor that it returns becomes the caller's, null if it threw; where it returns
// nothing, 0 or 1 if it threw.
template <typename F>
auto guarded(F&& body) {
  constexpr bool returns = !std::is_void_v<decltype(body())>;
  try {
    if constexpr (returns) {
      return new at::Tensor(body());
    } else {
      body();
      return 0;
    }
  } catch (const std::exception& error) {
    last_error = error.what();
    if constexpr (returns) {
      return static_cast<at::Tensor*>(nullptr);
    } else {
      return 1;
    }
  }
}

// The best instructions that the processor has, chosen when the program starts. Their results are
// the same: sums have a fixed number of lanes, and the build forbids contraction.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BEST_TARGET __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BEST_TARGET
#endif

// Small functions inside such loops: one that is called, and not inlined, has no vector instructions.
#define INLINE [[gnu::always_inline]] inline
