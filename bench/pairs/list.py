import sys
n=sys.argv[1:]
open('list.h','w').write('#pragma once\n'+''.join(f'extern const Timed variant_{x};\n' for x in n)+'static const Timed* variants[] = {'+', '.join('&variant_'+x for x in n)+'};\n')
