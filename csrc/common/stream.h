// cudaStream_t without the CUDA toolkit, so that every op header compiles with g++ alone.
#pragma once

struct CUstream_st;
using cudaStream_t = CUstream_st*;
