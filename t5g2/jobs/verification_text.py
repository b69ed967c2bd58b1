"""The real text on which an imported model is compared with transformers: eleven languages, and code.

The first article of the Universal Declaration of Human Rights (United Nations, 1948) in its translations.
"""

TEXT = """\
All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should \
act towards one another in a spirit of brotherhood.
Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience et \
doivent agir les uns envers les autres dans un esprit de fraternité.
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen \
einander im Geiste der Brüderlichkeit begegnen.
Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia, \
deben comportarse fraternalmente los unos con los otros.
Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de consciência, devem \
agir uns para com os outros em espírito de fraternidade.
Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны \
поступать в отношении друг друга в духе братства.
يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا وعليهم أن يعامل بعضهم بعضًا بروح الإخاء.
人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、\
互いに同胞の精神をもって行動しなければならない。
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा \
की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 서로 \
형제애의 정신으로 행동하여야 한다.

def is_brother(one, other):
    \"\"\"Returns True if both are endowed with reason and conscience.\"\"\"
    for being in (one, other):
        if not (being.reason and being.conscience):
            return False
    return one.dignity == other.dignity and one.rights == other.rights
"""
