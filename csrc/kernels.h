// The CPU kernels that are compiled once per instruction set: one table of functions for each, made in cpu/kernels.cpp.
#pragma once

#include "attention.h"
#include "decode_layers.h"
#include "divergence.h"
#include "forest_decode.h"
#include "layers.h"
#include "policy_loss.h"
#include "sample.h"
#include "token_logps.h"

namespace fastalign {

struct Kernels {
  void (*token_logps)(const TokenLogps& op, bool backward, int threads);
  void (*policy_loss)(const PolicyLoss& op, int threads);
  void (*divergence)(const Divergence& op, Walk walk, int threads);
  void (*attention)(const Attention& op, bool backward, int threads);
  void (*forest_decode)(const ForestDecode& op, int threads);
  void (*sample)(const Sample& op, int threads);
  void (*rms_norm)(const RmsNorm& op, bool backward, int threads);
  void (*silu_mul)(const SiluMul& op, bool backward, int threads);
  void (*rotate)(const Rotation& op, bool adjoint, int threads);
  void (*decode_layers)(const DecodeStep& step, const DecodeLayer* layers, int64_t count, int threads);
};

namespace scalar { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace fastalign
