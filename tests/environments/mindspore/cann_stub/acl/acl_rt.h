#pragma once
#include "acl/acl_base.h"

enum aclCubeMathType {};
enum aclSysParamOpt {};
enum aclrtCallbackBlockType {};
enum aclrtDevResLimitType {};
enum aclrtEventRecordedStatus {};
enum aclrtFloatOverflowMode {};
enum aclrtLastErrLevel {};
enum aclrtMemAttr {};
enum aclrtMemHandleType {};
enum aclrtMemMallocPolicy {};
enum aclrtMemcpyKind {};
enum aclrtRunMode {};
enum aclrtStreamStatus {};

struct aclrtExceptionInfo;
struct aclrtMemUceInfo;
struct aclrtPhysicalMemProp;
typedef void *aclrtDrvMemHandle;
typedef void (*aclrtCallback)(void *user_data);
typedef void (*aclrtExceptionInfoCallback)(aclrtExceptionInfo *info);
