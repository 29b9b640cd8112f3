/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What the module and the programs that use it agree on. */
#ifndef TALLY_H
#define TALLY_H

#include <linux/ioctl.h>
#include <linux/types.h>

struct tally_add {
	__s64 amount; /* to be added */
	__s64 total;  /* the sum afterwards, written by the module */
};

#define TALLY_ADD   _IOWR('t', 1, struct tally_add)
#define TALLY_READ  _IOR('t', 2, __s64)
#define TALLY_CRASH _IO('t', 3) /* writes to a null pointer, on purpose */

#endif
