// The table of an instruction set.
#include "kernels.h"

namespace fastalign::LEVEL {

void token_logps(const TokenLogps& op, bool backward, int threads);
void policy_loss(const PolicyLoss& op, int threads);
void divergence(const Divergence& op, Walk walk, int threads);
void attention(const Attention& op, bool backward, int threads);
void forest_decode(const ForestDecode& op, int threads);
void sample(const Sample& op, int threads);
void rms_norm(const RmsNorm& op, bool backward, int threads);
void silu_mul(const SiluMul& op, bool backward, int threads);
void rotate(const Rotation& op, bool adjoint, int threads);
void decode_layers(const DecodeStep& step, const DecodeLayer* layers, int64_t count, int threads);

const Kernels kernels{token_logps, policy_loss, divergence, attention,    forest_decode,
                      sample,      rms_norm,    silu_mul,   rotate,       decode_layers};

}  // namespace fastalign::LEVEL
