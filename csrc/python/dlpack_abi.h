// dlpack_abi.h - the structs through which tensor libraries hand each other memory: DLPack 1.3, as C lays them out.
//
// Our own words for a stable ABI (https://dmlc.github.io/dlpack/latest/c_api.html); names as there, so that a
// reader finds them. Only what this extension uses is named; what it passes over keeps its place.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_DLPACK_ABI_H
#define MS_DLPACK_ABI_H

#include <stdint.h>

enum { DLPACK_MAJOR = 1, DLPACK_MINOR = 3 };

typedef struct DLPackVersion { // another major: another layout of what follows it
  uint32_t major, minor;
} DLPackVersion;

enum { DL_CPU = 1, DL_CUDA_HOST = 3, DL_ROCM_HOST = 11 }; // device types that the CPU can read
enum { DL_CUDA = 2, DL_CUDA_MANAGED = 13 };               // that a CUDA device can

typedef struct DLDevice {
  int32_t device_type, device_id;
} DLDevice;

enum { DL_INT = 0, DL_UINT, DL_FLOAT, DL_OPAQUE, DL_BFLOAT, DL_COMPLEX, DL_BOOL }; // type codes

typedef struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
} DLDataType;

typedef struct DLTensor {
  void *data; // may be NULL when there is no element
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;   // [ndim]
  int64_t *strides; // [ndim] in elements; NULL: row-major
  uint64_t byte_offset;
} DLTensor;

// Capsule "dltensor", once taken "used_dltensor". The consumer calls deleter(self) once.
typedef struct DLManagedTensor {
  DLTensor dl_tensor;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

enum { DL_READ_ONLY = 1, DL_IS_COPIED = 2 }; // bits of flags

// Capsule "dltensor_versioned", once taken "used_dltensor_versioned".
typedef struct DLManagedTensorVersioned {
  DLPackVersion version;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensorVersioned *self);
  uint64_t flags;
  DLTensor dl_tensor;
} DLManagedTensorVersioned;

// The C exchange table: capsule "dlpack_exchange_api" in type.__dlpack_c_exchange_api__, valid for the whole
// process. All functions need the GIL; they return 0, or -1 with a Python exception set.
typedef struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  struct DLPackExchangeAPIHeader *prev_api; // the table of an older major version, or NULL
} DLPackExchangeAPIHeader;

typedef struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  void (*managed_tensor_allocator)(void);
  int (*managed_tensor_from_py_object_no_sync)(void *object, DLManagedTensorVersioned **out);
  void (*managed_tensor_to_py_object_no_sync)(void);
  // Nothing is owned: the fields lie in the object. May be NULL.
  int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *out);
  // The stream that the producer's own work on this device goes to now; *stream NULL: the default one. May be NULL.
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void **stream);
} DLPackExchangeAPI;

#endif
