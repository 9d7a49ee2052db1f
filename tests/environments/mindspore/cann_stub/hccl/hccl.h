#pragma once
#include "hccl/hccl_types.h"
