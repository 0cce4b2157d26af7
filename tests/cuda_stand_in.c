/* Stands for libcuda.so.1 on a machine without a GPU: what Triton's launcher calls succeeds and does nothing. A launch is shown
 * to `on_launch`; a tensor map holds the numbers that it was made of. */
#include "cuda.h"
#include <string.h>

int encodes;
void (*on_launch)(const unsigned *config, CUfunction f, void **params);

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  unsigned config[] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->sharedMemBytes, (unsigned)(size_t)c->hStream,
                       c->numAttrs, c->numAttrs ? c->attrs[0].id : 0, 1};
  if (c->numAttrs && c->attrs[0].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
    config[8] = c->attrs[0].value.clusterDim.x;
  if (on_launch)
    on_launch(config, f, params);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  cuuint64_t *at = (cuuint64_t *)map;
  encodes++;
  memset(map, 0, sizeof *map);
  *at++ = (cuuint64_t)address;
  at++; /* Triton clears a bit of this one */
  *at++ = type | rank << 8 | interleave << 16 | (cuuint64_t)swizzle << 24 | (cuuint64_t)promotion << 32 |
          (cuuint64_t)fill << 40;
  for (cuuint32_t i = 0; i < rank && i < 3; i++) {
    *at++ = dims[i];
    *at++ = i + 1 < rank ? strides[i] : 0;
    *at++ = box[i] | (cuuint64_t)steps[i] << 32;
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *out, CUpointer_attribute what, CUdeviceptr p) {
  *(CUdeviceptr *)out = p;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *c) {
  *c = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device) {
  *value = 227 << 10;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction f) {
  *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  *m = (CUmodule)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  static size_t last;
  *f = (CUfunction)(++last);
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  *version = 13020;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "stand-in";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *d, int i) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute what, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit l) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit l, size_t value) { return CUDA_SUCCESS; }
