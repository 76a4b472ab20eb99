// Launches: how many blocks, which kernel, one launch or two.
#pragma once

#include <c10/cuda/CUDAStream.h>

#include "packed_table.h"

namespace fastclip::cuda {

// How many blocks work on a table, at least 1. Depends on the table's size and the device alone.
int blocks_for(const PackedTable& table, c10::DeviceIndex device);

// Queues a job on a stream. Fills in what the job says of the table. Throws when CUDA refuses the launch.
void launch(Job job, const PackedTable& table, int blocks, c10::cuda::CUDAStream stream);

// Launches a kernel whose blocks wait for each other. False where they cannot all be resident together: then nothing
// was queued, and each part between two waits needs a launch of its own.
bool launch_cooperative(const void* kernel, int blocks, void** args, c10::cuda::CUDAStream stream);
void launch_plain(const void* kernel, int blocks, void** args, c10::cuda::CUDAStream stream);

// For tests: a number of blocks for every launch, 0 for the usual choice; and whether cooperative launches are tried.
void force_blocks(int blocks);
void allow_cooperative(bool allowed);

}  // namespace fastclip::cuda
