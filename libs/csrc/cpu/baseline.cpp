#include "kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

// What every processor of the architecture has.
namespace libs::baseline {
constexpr const char* NAME = "baseline";
#include "loops.inc"
}  // namespace libs::baseline
