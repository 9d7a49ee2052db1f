#pragma once
typedef void *HcclComm;
enum HcclResult {};
enum HcclReduceOp {};
enum HcclDataType {};
