// (cc_attention has the same file: a package's binary is known by the hash of its own sources.)
// Between TARGET_BEGIN and TARGET_END functions are compiled for an instruction set that not every processor has.
// (-march=native would not run on an older machine.)
#pragma once

#define TARGET_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define TARGET_BEGIN(features) \
  TARGET_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END TARGET_PRAGMA(clang attribute pop)
#else
#define TARGET_BEGIN(features) TARGET_PRAGMA(GCC push_options) TARGET_PRAGMA(GCC target(features))
#define TARGET_END TARGET_PRAGMA(GCC pop_options)
#endif
