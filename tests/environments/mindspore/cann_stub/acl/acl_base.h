// Stands in for CANN's header in a syntax check: names and shapes of types, no values that count.
#pragma once
#include <cstddef>
#include <cstdint>

typedef int aclError;
static const int ACL_SUCCESS = 0;
typedef void *aclrtStream;
typedef void *aclrtEvent;
typedef void *aclrtContext;

enum aclDataType { ACL_INT64 };
enum aclFormat {
  ACL_FORMAT_ND, ACL_FORMAT_NCL, ACL_FORMAT_NCHW, ACL_FORMAT_NCDHW, ACL_FORMAT_FRACTAL_NZ
};
enum aclMemType {};

struct aclDataBuffer;
struct aclTensorDesc;
struct aclopAttr;
