// The table of an instruction set.
#include "kernels.h"

namespace fastalign::LEVEL {

void token_logps(const TokenLogps& op, bool backward, int threads);
void policy_loss(const PolicyLoss& op, int threads);
void divergence(const Divergence& op, Walk walk, int threads);
void attention(const Attention& op, bool backward, int threads);
void forest_decode(const ForestDecode& op, int threads);
void rms_norm(const RmsNorm& op, bool backward, int threads);
void silu_mul(const SiluMul& op, bool backward, int threads);
void rotate(const Rotation& op, bool adjoint, int threads);

const Kernels kernels{token_logps, policy_loss, divergence, attention, forest_decode, rms_norm, silu_mul,
                      rotate};

}  // namespace fastalign::LEVEL
