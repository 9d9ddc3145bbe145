// A plain C entry to FlashInfer's checkpointing_ssu for `flashinfer_peer.py`: no binding of its own
// is needed. Types, sizes and window are fixed by checkpointing_ssu_config.inc, which the build
// fills in; the order of pointers, sizes, strides and knobs is that of `FlashInfer.step`.
#include "checkpointing_ssu_config.inc"
#include <flashinfer/mamba/checkpointing_ssu.cuh>
#include <flashinfer/mamba/launch_checkpointing_ssu.cuh>

#include <cstdio>
#include <cstring>

extern "C" int fi_checkpointing_ssu(
    void* const* ptr, int64_t const* size, int64_t const* stride, int64_t const* knob,
    void* stream, char* error, int64_t error_size) {
  using namespace flashinfer::mamba::checkpointing;
  try {
    CheckpointingSsuParams p;
    p.batch = size[0];
    p.nheads = size[1];
    p.dim = DIM;
    p.dstate = DSTATE;
    p.ngroups = size[2];
    p.state_cache_size = size[3];
    p.npredicted = NPREDICTED;
    p.max_window = MAX_WINDOW;
    p.pad_slot_id = -1;
    p.d_split = static_cast<int32_t>(knob[0]);
    p.dt_softplus = true;
    p.state = ptr[0];
    p.x = ptr[1];
    p.dt = ptr[2];
    p.A = ptr[3];
    p.B = ptr[4];
    p.C = ptr[5];
    p.output = ptr[6];
    p.x_cache = ptr[7];
    p.B_cache = ptr[8];
    p.dt_cache = ptr[9];
    p.ring_start = ptr[10];
    p.prev_num_accepted = ptr[11];
    p.D = ptr[12];
    p.dt_bias = ptr[13];
    p.state_batch_indices = ptr[14];
    p.cb_scaled = ptr[15];   // null: the monolithic kernel
    p.cumAdt_vec = ptr[16];
    p.cb_old = ptr[17];
    p.ring_buffer_len = MAX_WINDOW + NPREDICTED;
    p.state_stride_seq = stride[0];
    p.x_stride_seq = stride[1];
    p.x_stride_token = stride[2];
    p.dt_stride_seq = stride[3];
    p.dt_stride_token = stride[4];
    p.B_stride_seq = stride[5];
    p.B_stride_token = stride[6];
    p.C_stride_seq = stride[7];
    p.C_stride_token = stride[8];
    p.out_stride_seq = stride[9];
    p.out_stride_token = stride[10];
    p.x_cache_stride_seq = stride[11];
    p.x_cache_stride_head = stride[12];
    p.x_cache_stride_pos = stride[13];
    p.B_cache_stride_seq = stride[14];
    p.B_cache_stride_group = stride[15];
    p.B_cache_stride_pos = stride[16];
    p.dt_cache_stride_seq = stride[17];
    p.dt_cache_stride_head = stride[18];
    launchCheckpointingSsu<input_t, dt_t, weight_t, matrixA_t, state_t, stateIndex_t,
                           state_scale_t>(p, static_cast<int>(knob[1]), static_cast<int>(knob[2]),
                                          static_cast<int>(knob[3]),
                                          static_cast<cudaStream_t>(stream));
    return 0;
  } catch (std::exception const& e) {
    std::snprintf(error, error_size, "%s", e.what());
    return 1;
  } catch (...) {
    std::snprintf(error, error_size, "unknown error");
    return 2;
  }
}
