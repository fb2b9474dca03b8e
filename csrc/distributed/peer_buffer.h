// Memory of a GPU that other processes of the host map.
#pragma once

#include <cstdint>

namespace nano_vllm::cuda {

// On the current device, of zeros.
void* allocate_peer_buffer(int64_t num_bytes);
void free_peer_buffer(void* buffer);

constexpr int kPeerHandleBytes = 64;
void export_peer_buffer(void* buffer, uint8_t* handle);
void* import_peer_buffer(const uint8_t* handle);
void close_peer_buffer(void* buffer);

}  // namespace nano_vllm::cuda
