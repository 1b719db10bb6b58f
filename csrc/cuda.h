// The kernels on the GPU: addresses on the current device, the stream as an integer. Each enqueues and returns null, or the
// runtime's description of what went wrong.
#pragma once

#include "policy_loss.h"
#include "token_logps.h"

extern "C" {

// Sets this thread's device for the calls that follow: the CUDA runtime linked in here does not see torch's choice.
const char* fastalign_use_device_cuda(int device);

// How many blocks share a row, so that few rows occupy the device; a power of two.
int fastalign_blocks_per_row_cuda(int64_t rows, int64_t vocabulary);

// Bytes of scratch memory that the forward wants when several blocks share a row.
int64_t fastalign_scratch_cuda(const fastalign::TokenLogps* op);

const char* fastalign_token_logps_forward_cuda(const fastalign::TokenLogps* op, int blocks_per_row, void* scratch,
                                               uint64_t stream);
const char* fastalign_token_logps_backward_cuda(const fastalign::TokenLogps* op, int blocks_per_row, uint64_t stream);

// How many blocks hold a row in their shared memory, so that it is read once: a power of two, or 0 when it does not fit.
int fastalign_policy_loss_cluster_cuda(const fastalign::PolicyLoss* op);
const char* fastalign_policy_loss_cuda(const fastalign::PolicyLoss* op, int cluster, uint64_t stream);
}
